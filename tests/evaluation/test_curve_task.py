"""The curve: sizes of one memory, asked once each; what is not of the same model and memory is refused."""

import copy
import dataclasses
import json
import types

import pytest

from msa_jax.errors import ConfigError, DataError
from msa_jax.evaluation.evaluate import evaluate, report
from msa_jax.evaluation.tasks import curve
from msa_jax.runs.config import RunConfig
from tests.training.conftest import SETTINGS, haystack, save_start

__all__ = ["haystack"]
OWN = ["questions=5", "first=1024"]


@pytest.fixture(scope="module")
def trained(haystack, tmp_path_factory):
    """A run that has only begun, and texts that no package documents."""
    settings = copy.deepcopy(SETTINGS)
    settings["data"] |= {"folder": str(haystack), "num_words": 32, "key_format": "{a}-{b}-{n}"}
    run, workdir = RunConfig.from_dict(settings), tmp_path_factory.mktemp("run")
    save_start(run, workdir)
    texts = [json.loads(line)["text"] for line in (haystack / "documents.jsonl").read_text().splitlines()]
    return run, workdir, texts


@pytest.fixture
def workdir(trained, monkeypatch):
    installed = types.SimpleNamespace(passages=lambda: trained[2])
    monkeypatch.setattr(curve, "PythonDocsSource", lambda split, packages: installed)
    return trained[1]


def test_sizes_are_asked_once_and_told_apart(trained, workdir, monkeypatch):
    small, large = rows = evaluate(None, workdir, [1024, 3072], task="curve", settings=OWN)
    assert [row["memory_tokens"] for row in rows] == [1024, 3072]
    assert small["tokens"] <= 1024 < large["tokens"] <= 3072 and small["documents"] < large["documents"]
    assert small["questions"] == large["questions"] == 5
    for row in rows:
        assert len(row["router_recall@1"]) == len(row["margin_mean"]) == 1
    assert small["router_recall@16"][0] >= large["router_recall@16"][0]
    assert small["margin_mean"][0] >= large["margin_mean"][0]  # more documents, and the same questions
    assert "| 1,024 |" in report(rows, "curve", workdir)
    assert (workdir / "eval_curve.png").stat().st_size > 5000

    monkeypatch.setattr(curve, "ask", None)  # what is there already is not asked again
    assert evaluate(None, workdir, [1024, 3072], task="curve", settings=OWN) == rows
    with pytest.raises(DataError, match="scores of another model, memory or settings; give another --json"):
        evaluate(None, workdir, [1024], task="curve", settings=[*OWN, "seed=2"])
    with pytest.raises(DataError, match="holds a memory with other"):
        evaluate(None, workdir, [1024], task="curve", settings=[*OWN, "seed=2"], out=workdir / "other.json")


def test_a_model_is_asked_as_the_config_has_it(trained, workdir, monkeypatch, tmp_path):
    run, asked = trained[0], []

    def ask(inputs, *rest):
        asked.append(inputs.model.config)
        raise KeyboardInterrupt

    monkeypatch.setattr(curve, "ask", ask)
    sharper = RunConfig.from_dict({**run.to_dict(), "model": run.to_dict()["model"] | {"router_bias_scale": 2.5}})
    with pytest.raises(KeyboardInterrupt):
        evaluate(sharper, workdir, [1024], task="curve", settings=OWN, memory=tmp_path, out=tmp_path / "a.json")
    assert asked[0].router_bias_scale == 2.5


def test_what_cannot_be_asked_is_said_before_anything_is_encoded(workdir, monkeypatch):
    monkeypatch.setattr(curve, "grown_bank", None)
    with pytest.raises(ConfigError, match="there is no step 'train'"):
        evaluate(None, workdir, [1024], task="curve", settings=["steps=train"], out=workdir / "none.json")
    with pytest.raises(DataError, match='of data.source "needles"; give one of "ruler"'):
        evaluate(None, workdir, [1024], task="ruler")


def test_baselines_are_rows_of_the_needles_table(trained, tmp_path):
    run = trained[0]
    few = dataclasses.replace(run.evaluation, num_questions=2, max_rounds=1, max_new_tokens=8)
    run, options = dataclasses.replace(run, evaluation=few), {"out": tmp_path / "a.json"}
    names = ["bm25", "bag_of_words", "dense"]
    rows = evaluate(run, trained[1], [1024], baselines=names, **options)
    assert [row["retriever"] for row in rows] == ["router", *names]
    assert len({(row["memory_tokens"], row["documents"], row["questions"]) for row in rows}) == 1
    for row in rows[1:3]:
        assert row["recall@1"] <= row["recall@16"] == 1 and row["id_recall"] == row["recall@1"]  # the best one is read
    for row in rows[1:]:
        assert "exact_match" in row and not any(name.startswith("router") for name in row)
    assert "| bm25 |" in report(rows, "needles", None)
    with pytest.raises(ConfigError, match="dense reads all of the memory at once: ask at most 65,536 tokens"):
        evaluate(run, trained[1], [1024, 100_000], baselines=["dense"], **options)
