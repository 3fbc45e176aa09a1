"""Every field of a run can be changed by flag, and what files in configs/ return is valid."""

import dataclasses
import importlib.util
import json
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from msa_jax.data.sources import settings_type
from msa_jax.errors import ConfigError
from msa_jax.runs.config import RunConfig, full_config
from msa_jax.runs.open import open_run
from msa_jax.runs.workdir import check_workdir, written_settings


@pytest.fixture
def parse(settings, monkeypatch):
    """The run that a command line makes of the settings."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prog", *arguments])  # config_flags looks for overrides there
        values = flags.FlagValues()
        holder = config_flags.DEFINE_config_dict("config", full_config(settings), flag_values=values)
        values(sys.argv)
        return RunConfig.from_dict(holder.value.to_dict())

    return run


@pytest.mark.parametrize(
    "name", ["abstention", "babi", "demo", "jsonl", "python_docs", "ruler", "ruler_single", "wiki"]
)
def test_shipped_configs_are_valid(root, name, monkeypatch):
    monkeypatch.syspath_prepend(root)
    path = root / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"config_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"--config=configs/{name}.py" in module.__doc__
    config = module.get_config()
    if name in ("babi", "jsonl", "wiki"):
        config.data.folder = "somewhere"
    config.init_from = ""  # what a config goes on from is a run's
    run = RunConfig.from_dict(config.to_dict())
    assert run.training.steps > 50 and run.model_config(vocab_size=99).vocab_size == 99


def test_what_is_not_given_is_the_default(settings):
    assert RunConfig.from_dict(full_config(settings).to_dict()).data == RunConfig.from_dict(settings).data
    full, given = full_config(settings).to_dict(), RunConfig.from_dict(settings)
    assert RunConfig.from_dict(full).training == given.training
    assert RunConfig.from_dict(full).model_config(vocab_size=64) == given.model_config(vocab_size=64)


def test_every_kind_of_field_can_be_set_by_flag(parse):
    run = parse(
        "--config.model.num_layers=6",
        "--config.model.router_layers=(1, 5)",
        "--config.model.dtype=bfloat16",
        "--config.data.max_chars=1000",
        "--config.data.packages=('numpy',)",
        "--config.data.loss_weights.id=2.5",
        "--config.training.phases[1].steps=7",
        "--config.training.optimizer.ema_decay=0.5",
        "--config.training.tied_router=false",
        "--config.init_from=",
        "--config.evaluation.seed=9",
    )
    model = run.model_config(vocab_size=64)
    assert (model.num_layers, model.router_layers, model.dtype) == (6, (1, 5), "bfloat16")
    assert run.data.loss_weights.id == 2.5
    assert (run.data.settings.max_chars, run.data.settings.packages) == (1000, ("numpy",))
    assert [p.steps for p in run.training.phases] == [50, 7]
    assert run.training.optimizer.ema_decay == 0.5 and not run.training.tied_router
    assert run.evaluation.seed == 9


def test_unknown_parts_are_refused(settings, parse):
    with pytest.raises(ConfigError, match="optimiser"):
        full_config(settings | {"optimiser": {}})
    with pytest.raises(AttributeError, match="nosuch"):
        parse("--config.training.nosuch=1")


def test_settings_stay_as_they_were_written_when_runs_come_to_have_more(settings, tmp_path):
    run = RunConfig.from_dict(settings)
    check_workdir(run, tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert written_settings(tmp_path) == written == json.loads(json.dumps(run.to_dict()))
    del written["training"]["bag_of_words"]  # as before there was one
    path.write_text(json.dumps(written))
    check_workdir(run, tmp_path)
    assert written_settings(tmp_path) == written != json.loads(json.dumps(run.to_dict()))
    assert RunConfig.from_dict(written) == run


def test_a_run_folder_of_an_earlier_version_is_the_same_run(settings, tmp_path):
    """Runs were once written with the settings of all sources, those of others without effect, and other names."""
    settings["data"]["max_chars"] = 9_000
    written = json.loads(json.dumps(RunConfig.from_dict(settings).to_dict()))
    for source in ("babi", "jsonl", "python_docs", "ruler"):
        for field in dataclasses.fields(settings_type(source)):
            written["data"].setdefault(field.name, field.default)
    written["data"] |= {"titles": True, "ruler_tasks": ["niah_single_1"]}
    written["tokenizer"]["uuid_pairs"] = written["data"].pop("uuid_pairs")
    written["model"]["top_k"] = written["model"].pop("top_k_documents")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(written))
    check_workdir(RunConfig.from_dict(settings), tmp_path)
    assert open_run(tmp_path) == RunConfig.from_dict(settings) and path.read_text() == json.dumps(written)
    other = RunConfig.from_dict(settings | {"data": settings["data"] | {"num_words": 12}})
    # One that was refused before its first step leaves nothing that binds.
    (tmp_path / "tokenizer").mkdir()
    check_workdir(other, tmp_path)
    assert open_run(tmp_path) == other and not (tmp_path / "tokenizer").exists()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="other settings of data.num_words;"):
        check_workdir(RunConfig.from_dict(settings), tmp_path)


@pytest.mark.parametrize("name", ["num_questions", "batch_size", "max_rounds", "max_new_tokens", "rows_per_step"])
def test_what_evaluation_cannot_do_is_refused_at_once(settings, name):
    settings["evaluation"] = settings.get("evaluation", {}) | {name: 0}
    with pytest.raises(ConfigError, match=f"evaluation.{name} must be at least 1, got 0"):
        RunConfig.from_dict(settings)


def test_settings_are_read_under_earlier_names(settings):
    ruler = {"data": settings["data"] | {"source": "ruler", "num_words": 256}, "tokenizer": {"uuid_pairs": True}}
    for made in (settings | ruler, full_config(settings | ruler).to_dict()):
        assert RunConfig.from_dict(made).data.settings.uuid_pairs
    with pytest.raises(ConfigError, match="data.uuid_pairs is a setting of ruler, and does nothing with .*'needles'"):
        RunConfig.from_dict(settings | {"tokenizer": {"uuid_pairs": True}})
