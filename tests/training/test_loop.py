"""A run as a whole: it learns, survives any interruption, and refuses what cannot work."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from msa_jax.checkpoints.run import Checkpoints
from msa_jax.errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from msa_jax.evaluation.evaluate import evaluate, report
from msa_jax.runs.build import make_model, open_tokenizer, train_run
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model
from msa_jax.sharding import MeshConfig
from tests.training.conftest import write_config


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_params(settings, workdir):
    model, _ = load_model(RunConfig.from_dict(settings), workdir)
    return jax.tree.leaves(nnx.as_pure(nnx.state(model)))


def command(root, config_file, workdir, *flags):
    # One device, the program without a mesh; tests in this process run on all devices that it has. What is compiled is
    # kept beside the workdir, so that a run that goes on does not compile again.
    changed = {
        "PYTHONPATH": str(root),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen(
        [sys.executable, root / "train.py", f"--config={config_file}", f"--workdir={workdir}", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | changed,
    )  # fmt: skip


def wait_for_step(process, workdir, step, seconds=240):
    """Return once `step` is logged."""
    end = time.monotonic() + seconds
    path = workdir / "metrics.jsonl"
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


@pytest.mark.slow  # test_processes.py kills a run and goes on with it by default
def test_a_run_learns_and_survives_every_interruption(root, settings, config_file, tmp_path):
    """Loss falls and recall rises beyond stated bounds; SIGTERM, SIGKILL and resuming change no bit.

    With documents of recent batches in memory, which a checkpoint must hold too.
    """
    settings["training"]["phases"][1]["recent"] = 2
    write_config(config_file, settings)
    run = RunConfig.from_dict(settings)
    whole = tmp_path / "whole"
    output, _ = command(root, config_file, whole).communicate(timeout=240)
    assert "'step': 120, 'finished': True" in output, output
    rows = logged(whole)
    assert [r["step"] for r in rows] == list(range(1, 121))
    early = np.mean([r["recall@1"] for r in rows[:10]])
    late = np.mean([r["recall@1"] for r in rows[-10:]])
    assert early < 0.35 and late > 0.45, (early, late)  # one of 16 documents, later of 48
    assert rows[-1]["lm_loss"] < 0.75 * rows[0]["lm_loss"]
    assert rows[-1]["aux_loss"] < 0.5 * rows[0]["aux_loss"]

    cut = tmp_path / "cut"
    process = command(root, config_file, cut)
    wait_for_step(process, cut, 16)
    process.send_signal(signal.SIGSTOP)  # else it might end before it has been refused here
    with pytest.raises(ConfigError, match="another training process"):
        train_run(run, cut)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "'finished': False" in output

    process = command(root, config_file, cut)
    wait_for_step(process, cut, 63)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and logged(cut)[-1]["step"] < 120
    process = command(root, config_file, cut)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resumed after step" in output and "'finished': True" in output

    for mine, theirs in zip(final_params(settings, cut), final_params(settings, whole), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    keep = ("step", "loss", "lm_loss", "aux_loss", "recall@1", "grad_norm")
    assert [{k: r[k] for k in keep} for r in logged(cut)] == [{k: r[k] for k in keep} for r in rows]

    # What was trained can be evaluated: rows, table, file and picture are there.
    scores = evaluate(run, cut, [2048, 4096])
    assert [r["memory_tokens"] for r in scores] == [2048, 4096]
    assert all(abs(r["tokens"] - r["memory_tokens"]) < 0.1 * r["memory_tokens"] for r in scores)
    assert scores[0]["router_recall@16"][0] > 0.8
    assert "exact match" in report(scores, "needles", cut)
    assert json.loads((cut / "eval.json").read_text())["rows"] == scores
    assert (cut / "curve.png").stat().st_size > 5000

    # One document that the router chose, without a round in which the model names any.
    asked = dataclasses.replace(run.evaluation, mode="router")
    routed = evaluate(dataclasses.replace(run, evaluation=asked), cut, [2048])[0]
    assert routed["rounds"] == 0 and routed["answered"] > 0 and routed["id_precision"] == routed["id_recall"] > 0

    # Over two devices, each with half of the documents, it answers the same.
    halves = evaluate(dataclasses.replace(run, mesh=MeshConfig(memory=2)), cut, [2048])[0]
    timings = ("encode_seconds", "encode_tokens_per_second", "seconds_per_question", "bank_mib")
    assert {k: v for k, v in halves.items() if k not in timings} == {
        k: v for k, v in scores[0].items() if k not in timings
    }

    # A workdir is one run's.
    settings["data"]["num_documents"] = 18
    with pytest.raises(ConfigError, match=r"other settings of data.num_documents"):
        train_run(RunConfig.from_dict(settings), cut)


def test_moving_average_is_kept_and_used(settings, tmp_path):
    settings["training"]["phases"] = [{"steps": 2}]
    settings["training"]["optimizer"]["ema_decay"] = 0.75
    run = RunConfig.from_dict(settings)
    train_run(run, tmp_path)
    averaged = final_params(settings, tmp_path)
    settings["training"]["optimizer"]["ema_decay"] = 0.0
    last = final_params(settings, tmp_path)
    start = jax.tree.leaves(nnx.as_pure(nnx.state(make_model(run, open_tokenizer(run, tmp_path, train=False)))))
    moved = 0
    for ema, new, old in zip(averaged, last, start, strict=True):
        # After two steps the average holds the start with weight 0.75^2 and lies between it and the last.
        low, high = np.minimum(old, new) - 1e-6, np.maximum(old, new) + 0.02
        moved += np.abs(new - old).max() > 1e-3
        assert (ema >= low - 0.02).all() and (ema <= high).all()
        assert np.abs(ema - old).sum() < 0.6 * np.abs(new - old).sum() + 1e-6
    assert moved > 10


def test_nan_stops_the_run_and_names_the_step(settings, tmp_path):
    settings["training"]["optimizer"] |= {"name": "adamw", "learning_rate": 1e30, "warmup_steps": 0}
    settings["training"]["checkpoint_every"] = 100
    with pytest.raises(TrainingDiverged, match=r"loss of step [23] is"):
        train_run(RunConfig.from_dict(settings), tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest_step is None
    checkpoints.close()


def test_more_targets_than_allowed_is_an_error(settings, tmp_path):
    settings["training"]["max_targets"] = 5
    with pytest.raises(ConfigError, match="max_targets is 5; raise it"):
        train_run(RunConfig.from_dict(settings), tmp_path)


def test_evaluating_an_untrained_workdir_is_an_error(settings, tmp_path):
    run = RunConfig.from_dict(settings)
    open_tokenizer(run, tmp_path, train=True)
    with pytest.raises(CheckpointError, match="no checkpoint here; train first"):
        evaluate(run, tmp_path, [2048])
    unknown = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, mode="best"))
    with pytest.raises(ConfigError, match="mode must be one of generate, constrained, router, latent, got 'best'"):
        evaluate(unknown, tmp_path, [2048])


def test_bad_data_ends_in_a_sentence_before_training(root, settings, haystack, tmp_path):
    del settings["data"]["num_words"]
    settings["data"] |= {"source": "jsonl", "folder": str(tmp_path)}
    for line, fault in (
        ('{"id": "x", "title": "t", "text": ""}', "no text"),
        ('{"id": "x", "title":', "JSON"),
        ('{"id": "0", "title": "t", "text": "again"}', "already"),
    ):
        (tmp_path / "documents.jsonl").write_text((haystack / "documents.jsonl").read_text() + line + "\n")
        with pytest.raises(DataError, match=f"documents.jsonl:61.*{fault}"):
            train_run(RunConfig.from_dict(settings), tmp_path / "run")
    config = tmp_path / "config.py"
    write_config(config, settings)
    output, _ = (process := command(root, config, tmp_path / "run")).communicate(timeout=120)
    assert process.returncode == 1
    assert "documents.jsonl:61" in output and "Traceback" not in output, output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_setting_that_does_not_exist_is_named(root, config_file, tmp_path):
    process = command(root, config_file, tmp_path / "run", "--config.data.nonsense=2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and not (tmp_path / "run").exists()
    assert "the config has no field 'nonsense' (--help lists flags;" in output and "Traceback" not in output, output
