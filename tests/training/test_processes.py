"""Training and evaluation as several real processes on loopback."""

import json
import signal
import time

import numpy as np
import pytest

from tests.training.processes import finish, launch, text, wait_for

STEPS = 30
TIMES = ("encode_seconds", "encode_tokens_per_second", "seconds_per_question")


@pytest.fixture
def config(settings, tmp_path):
    """Settings as a file, of a run whose steps take milliseconds."""
    settings["model"] |= {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_size": 32}
    settings["training"] |= {
        "phases": [{"steps": STEPS, "aux_weight": 1.0}],
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "warmup_steps": 2},
        "copy_scale": 0.0,
        "checkpoint_every": 5,
    }
    settings["evaluation"] |= {"batch_size": 3, "max_new_tokens": 4}
    path = tmp_path / "config.py"
    path.write_text(
        "from msa_jax.runs.config import full_config\n\n\n"
        f"def get_config():\n    return full_config({settings!r})\n"
    )
    return f"--config={path}"


def logged(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same_run(rows, want):
    assert [r["step"] for r in rows] == [r["step"] for r in want] == list(range(1, STEPS + 1))
    for name in ("loss", "lm_loss", "aux_loss", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in want], rtol=2e-4, err_msg=name)
    assert [r["recall@1"] for r in rows] == [r["recall@1"] for r in want]


def evaluated(cache, config, workdir, processes):
    arguments = (config, f"--workdir={workdir}", "--memory_tokens=2048")
    status, output = finish(launch(cache, "eval.py", processes, *arguments))
    assert status == [0] * processes, output
    rows = json.loads((workdir / "eval.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.mark.slow
def test_two_processes_are_as_one_and_one_goes_on_alone(config, tmp_path):
    """Losses are those of one process and device; a death of one ends both; one process goes on with what two have
    saved, and evaluates as two do."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    one = launch(tmp_path, "train.py", 1, config, f"--workdir={alone}")
    arguments = (config, f"--workdir={shared}")
    two = launch(tmp_path, "train.py", 2, *arguments, "--config.mesh.memory=2", "--config.mesh.fsdp=True")

    # Process 1 is killed, and process 0 ends by itself, says why, and does not hang.
    wait_for(two, lambda: len(logged(shared)) > 12)
    two[1].kill()
    begin = time.monotonic()
    status, output = finish(two, 60)
    assert status[0] not in (0, -signal.SIGKILL) and time.monotonic() - begin < 45
    assert "another process has ended" in output[0] or "another task died" in output[0], output[0]

    assert len(list((shared / "tensorboard").iterdir())) == 1  # process 0 alone writes logs
    status, output = finish(one)
    assert status == [0], output

    # One process with one device goes on.
    status, output = finish(launch(tmp_path, "train.py", 1, *arguments))
    assert status == [0] and "resumed after step" in output[0] and "'finished': True" in output[0], output
    assert_same_run(logged(shared), logged(alone))
    assert evaluated(tmp_path, config, shared, 2) == evaluated(tmp_path, config, shared, 1)


@pytest.mark.parametrize(
    "different, statement",
    [
        (["--config.training.seed=5", "--config.mesh.fsdp=True"], "settings of training, mesh differ between"),
        pytest.param(
            ["--config.data.num_documents=0"],
            "process 1 of 2: train.py: data.num_documents must be at least 1, got 0.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_that_disagree_end_with_a_sentence(config, tmp_path, different, statement):
    workdir = tmp_path / "run"
    two = launch(tmp_path, "train.py", 2, config, f"--workdir={workdir}", different=different)
    wait_for(two, lambda: statement in text(two[1]) or two[1].poll() is not None)
    two[1].wait(10)  # not for process 0, which may not know yet
    status, output = finish(two, 60)
    assert all(status) and statement in output[1], output
    assert not workdir.exists()  # nothing was begun


@pytest.mark.parametrize(
    "flags, statement",
    [
        (["--num_processes=2"], "--coordinator, --process_id missing"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "--coordinator must be host:port, got 'here'."),
        pytest.param(
            ["--coordinator=h:1", "--num_processes=2", "--process_id=2"],
            "0 to num_processes - 1, got 2 of 2",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--config.mesh.modle=2"], "modle", marks=pytest.mark.slow),
    ],
)
def test_flags_that_do_not_fit_are_a_sentence(config, tmp_path, flags, statement):
    (process,) = launch(tmp_path, "train.py", 1, config, f"--workdir={tmp_path / 'run'}", *flags)
    status, output = finish([process], 60)
    assert status == [1] and statement in output[0] and "Traceback" not in output[0], output


@pytest.mark.slow
def test_four_processes_with_two_devices_each(config, tmp_path):
    arguments = (config, "--config.data.num_questions=8")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    status, output = finish(launch(tmp_path, "train.py", 1, *arguments, f"--workdir={alone}"))
    assert status == [0], output
    mesh = [f"--config.mesh.{name}=2" for name in ("data", "memory", "model")]
    run = ("train.py", 4, *arguments, f"--workdir={shared}", *mesh)

    # SIGTERM reaches process 2 alone, and all save the same step.
    four = launch(tmp_path, *run, devices=2)
    wait_for(four, lambda: logged(shared), 400)
    four[2].send_signal(signal.SIGTERM)
    status, output = finish(four)
    assert status == [0] * 4 and all("'finished': False" in o for o in output), output
    saved = max(int(p.name) for p in (shared / "checkpoints").iterdir() if p.name.isdigit())
    assert 0 < saved < STEPS and all(f"'step': {saved}" in o for o in output)

    status, output = finish(launch(tmp_path, *run, devices=2), 400)
    assert status == [0] * 4 and "resumed after step" in output[0], output
    assert_same_run(logged(shared), logged(alone))
    assert evaluated(tmp_path, config, shared, 4) == evaluated(tmp_path, config, shared, 1)
