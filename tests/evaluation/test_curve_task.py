"""The curve: sizes of one memory, asked once each; what is not of the same model and memory is refused."""

import copy
import json
import pathlib
import sys
import types

import pytest
from benchmarks.quality import curve

from msa_jax.errors import DataError
from msa_jax.runs.config import RunConfig
from tests.training.conftest import SETTINGS, save_start

FLAGS = ["--memory", "memory", "--sizes", "1024,3072", "--top_k", "2", "--questions", "5", "--first", "1024"]


@pytest.fixture
def workdir(haystack, tmp_path, monkeypatch):
    """A run that has only begun, asked about text that no package documents."""
    settings = copy.deepcopy(SETTINGS)
    settings["data"] |= {"folder": str(haystack), "num_words": 32, "key_format": "{a}-{b}-{n}"}
    save_start(RunConfig.from_dict(settings), tmp_path / "run")
    texts = [json.loads(line)["text"] for line in (haystack / "documents.jsonl").read_text().splitlines()]
    installed = types.SimpleNamespace(passages=lambda: texts)
    monkeypatch.setattr(curve, "PythonDocsSource", lambda split, packages: installed)
    monkeypatch.chdir(tmp_path)
    return pathlib.Path("run")


def told(monkeypatch, workdir, *more):
    """What a call writes."""
    monkeypatch.setattr(sys, "argv", ["curve", "--workdir", str(workdir), *FLAGS, *more])
    curve.main()
    return json.loads((workdir / "curve.json").read_text())


def test_sizes_are_asked_once_and_told_apart(workdir, quick_compiles, monkeypatch, capsys):
    record = told(monkeypatch, workdir)
    small, large = record["rows"]
    assert [row["memory_tokens"] for row in (small, large)] == [1024, 3072]
    assert small["tokens"] <= 1024 < large["tokens"] <= 3072 and small["documents"] < large["documents"]
    assert small["questions"] == large["questions"] == 5 and small["top_k"] == 2
    for row in (small, large):
        assert len(row["router_recall@1"]) == len(row["margin_mean"]) == 1
    assert small["router_recall@16"][0] >= large["router_recall@16"][0]
    assert small["margin_mean"][0] >= large["margin_mean"][0]  # more documents, and the same questions
    assert record["encoded_documents"] >= large["documents"]
    assert (workdir / "memory_curve.png").stat().st_size > 5000
    assert "| 1K | 2 | 5 |" in capsys.readouterr().out
    assert record["command"] == (
        "python -m benchmarks.quality.curve --workdir runs/run --memory FOLDER --sizes 1024,3072 --top_k 2"
        " --router_bias_scale 1.0 --questions 5 --first 1024 --seed 1 --steps encode,ask"
    )

    monkeypatch.setattr(curve, "ask", None)  # what is there already is not asked again
    assert told(monkeypatch, workdir)["rows"] == record["rows"]
    with pytest.raises(DataError, match="scores of another model, .* router bias .*; give another --out"):
        told(monkeypatch, workdir, "--router_bias_scale", "2")


def test_the_bias_is_scaled_in_what_is_asked(workdir, monkeypatch):
    asked = []

    def ask(model, *rest):
        asked.append((model.config.router_bias_scale, model.config.top_k))
        raise KeyboardInterrupt

    monkeypatch.setattr(curve, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        told(monkeypatch, workdir, "--router_bias_scale", "2.5")
    assert asked == [(2.5, 2)]


@pytest.mark.parametrize(
    "flag, statement",
    [("--router_bias_scale=0", "router_bias_scale must be positive"), ("--top_k=0", "top_k must be an integer")],
)
def test_what_cannot_be_asked_is_said_before_anything_is_encoded(workdir, monkeypatch, flag, statement):
    monkeypatch.setattr(curve, "encode", None)
    with pytest.raises(SystemExit, match=f"curve: {statement}"):
        told(monkeypatch, workdir, flag)
