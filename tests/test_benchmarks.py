"""The benchmark of GPUs, rehearsed: its cases, its record of what failed, its targets; and how all of them measure."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, gpu_cases, gpu_targets, gpu_tuning, measure
from pallas_kernels.chunk_scores import gpu_config as scores_config
from pallas_kernels.gather_attention import gpu_config as attention_config

SMALL = gpu_cases.CASES[0]


def test_a_rehearsal_runs_every_step_and_writes_what_it_found(tmp_path, capsys):
    record = gpu.Record(tmp_path / "gpu_rehearsal.json", time.monotonic() + 300)
    gpu.run(record, steps=["correctness", "targets"], cases="small", tune=False, rehearse=True)
    entries = json.loads((tmp_path / "gpu_rehearsal.json").read_text())
    assert not [name for name, value in entries.items() if isinstance(value, dict) and "error" in value]
    assert entries["correctness, scores: small"]["passed"] and entries["correctness, attention: small"]["passed"]
    timed = [name for name, value in entries.items() if isinstance(value, dict) and value.get("ms", 0) > 0]
    for what in ("routing, bfloat16", "routing, int8 both", "attention forward,", "attention forward and backward"):
        assert any(name.startswith(what) for name in timed), what
    assert "2 of 2 cases correct" in capsys.readouterr().out


@pytest.mark.parametrize("case", [c for c in gpu_cases.CASES if "real" not in c.name and "training" not in c.name],
                         ids=lambda case: case.name)  # fmt: skip
def test_every_case_is_well_formed(case):
    given, cotangents = gpu_cases.inputs(case)
    results = gpu_cases.run(case, gpu_cases.in_float32(given), cotangents, "xla")
    names = {"scores"} if isinstance(case, gpu_cases.Scores) else {"out", "lse"}
    assert names <= set(results) and (len(results) > len(names)) == case.gradients


def test_case_names_differ():
    assert len({case.name for case in gpu_cases.CASES}) == len(gpu_cases.CASES)


@pytest.mark.parametrize("wrong", ["too far", "nan", "not the same twice", None])
def test_a_wrong_kernel_fails_its_case(wrong, monkeypatch):
    right, calls = gpu_cases.run, []

    def run(case, given, cotangents, implementation):
        results = right(case, given, cotangents, "xla")
        if implementation == "gpu":
            calls.append(1)
            change = {"too far": 0.01, "nan": jnp.nan, "not the same twice": 1e-6 * len(calls), None: 0.0}[wrong]
            results = {name: x.at[0, 3].add(change) for name, x in results.items()}
        return results

    monkeypatch.setattr(gpu_cases, "run", run)
    assert gpu_cases.check(SMALL)["passed"] == (wrong is None)


def test_the_record_keeps_errors_and_goes_on_until_time_is_up(tmp_path, capsys):
    record = gpu.Record(tmp_path / "new" / "gpu.json", time.monotonic() + 60)

    def fails():
        raise RuntimeError("no room")

    record.attempt("first", fails)
    record.attempt("second", lambda: {"ms": 1.5})
    record.deadline = time.monotonic() - 1
    record.attempt("third", lambda: pytest.fail("begun too late"))
    entries = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert entries["first"]["error"] == "RuntimeError: no room" and entries["second"]["ms"] == 1.5
    assert "out of time" in entries["third"]["error"] and "no room" in capsys.readouterr().out


def test_targets_are_met_or_missed():
    entries = {
        "routing, bfloat16, B 1, T 64, gpu": {"ms": 0.8, "of_copy_bandwidth": 0.86},
        "routing, int8 keys, B 1, T 64, gpu": {"ms": 0.5, "of_copy_bandwidth": 0.7},
        "routing and selection of 18 layers, T 64, gpu": {"ms": 16.0},
        "attention forward, B 1, T 64, S 128, gpu": {"ms": 1.0, "of_floor": 0.5},
        "attention forward, B 1, T 64, S 128, xla": {"ms": 1.4, "of_floor": 0.4},
        "routing, bfloat16, B 8, T 64, gpu": {"error": "no"},
    }
    rows = {row["what"]: (round(row["figure"], 6), row["met"]) for row in gpu.summary(entries)}
    assert rows == {
        "routing, bfloat16, B 1, T 64: of_copy_bandwidth": (0.86, True),
        "routing, bfloat16, B 1, T 64: int8_over_bfloat16": (1.6, False),
        "routing and selection of 18 layers, T 64: layers_ms": (16.0, True),
        "attention forward, B 1, T 64, S 128: of_floor": (0.5, False),
        "attention forward, B 1, T 64, S 128: xla_over_gpu": (1.4, True),
    }


def test_byte_floors():
    rates = gpu_targets.Rates(copy=1e9, matmul=1e30)
    sizes = gpu_targets.Sizes(heads=4, kv_heads=2, head_dim=8)
    forward = gpu_targets._attention_floor(sizes, rates, (1, 2, 3), 5, 7, False)
    q = out = 2 * 4 * 8 * 2
    own, lse, bank = 2 * 3 * 16 * 2, 2 * 4 * 4, 2 * 5 * 16 * 2
    assert forward == pytest.approx((q + out + own + lse + bank) / 1e9)
    both = gpu_targets._attention_floor(sizes, rates, (1, 2, 3), 5, 7, True)
    assert both == pytest.approx(2 * forward + (2 * q + own + 2 * 7 * 16 * 2) / 1e9)
    # One token sees all own tokens, of two the first sees one less: 5 + 5 chunks twice, 3 + 2 own, times 4 H D.
    arithmetic = gpu_targets._attention_floor(sizes, gpu_targets.Rates(1e30, 1.0), (1, 2, 3), 5, 7, False)
    assert arithmetic == pytest.approx(4 * 4 * 8 * (2 * 5 + 3 + 2))


def test_tuning_changes_the_blocks_for_its_scope_alone():
    before = dict(scores_config.BLOCKS)
    with gpu_tuning.scores_with(stages=2):
        assert {blocks.stages for blocks in scores_config.BLOCKS.values()} == {2}
    assert scores_config.BLOCKS == before and before["default"].stages != 2
    case = dict(rows=256, others=8, tiles=32, head_dim=128, dtype=jnp.bfloat16, bank_dtype=jnp.bfloat16)
    rule = attention_config.choose(**case)
    with gpu_tuning.attention_with(splits=rule.splits + 1):
        assert attention_config.choose(**case).splits == rule.splits + 1
    with gpu_tuning.attention_with(stages=99), pytest.raises(ValueError, match="does not fit"):
        attention_config.choose(**case)
    assert attention_config.choose(**case) == rule


def test_measuring():
    assert measure.exponent([10, 100, 1000], [3e1, 3e2, 3e3]) == pytest.approx(1.0)
    assert measure.exponent([1, 2, 4], [5, 20, 80]) == pytest.approx(2.0)
    calls = []
    medians = measure.median_seconds({"slow": lambda: time.sleep(0.02), "fast": lambda: calls.append(1)}, repeats=3)
    assert medians["slow"] > 0.02 > medians["fast"] and len(calls) == 4  # the first does not count
    seen = []
    seconds = measure.seconds_per_call(lambda x: seen.append(x) or time.sleep(0.001) or np.zeros(1), [(1,), (2,)],
                                       rounds=2, enough_seconds=0.01)  # fmt: skip
    assert 0.001 < seconds < 0.01 and seen[:6] == [1, 2] * 3
