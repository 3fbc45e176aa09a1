"""Retrieval alone, from folders to a table: batches, mined negatives, a run that goes on, recall against BM25."""

import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx

from msa_jax import export
from msa_jax.checkpoints import pretrained
from msa_jax.data import Renderer
from msa_jax.data.batch import REPLY
from msa_jax.data.pipeline import make_dataset
from msa_jax.errors import ConfigError
from msa_jax.eval import main
from msa_jax.evaluation import evaluate, mine
from msa_jax.runs import open as opening
from msa_jax.runs.build import make_model, make_source, open_tokenizer, train_run
from msa_jax.runs.config import RunConfig
from msa_jax.runs.workdir import check_workdir
from msa_jax.training.schedule import phase_at, phase_values
from msa_jax.training.step import loss_and_metrics

WORDS = [a + b + c for a in ("ba", "co", "di", "fu") for b in ("ge", "li", "mo") for c in ("nu", "pa", "ro", "se")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Passages with names of two words in two folders, that share some; questions name two passages."""
    root = tmp_path_factory.mktemp("passages")
    rng = np.random.default_rng(0)
    names = [f"{WORDS[i % 48].title()} {WORDS[(i * 7 + 5) % 48].title()}" for i in range(60)]
    documents = []
    for i, name in enumerate(names):
        sentences = [" ".join(rng.choice(WORDS, 8)).capitalize() + "." for _ in range(2 + 6 * (i % 5 == 0))]
        documents.append({"id": f"p{i}", "title": name, "text": f"{name} is here now. " + " ".join(sentences)})
    asked = [
        {
            "id": f"q{i}",
            "question": f"Is {names[i]} older than {names[i + 20]}?",
            "answers": ["yes"],
            "supporting_ids": [f"p{i}", f"p{i + 20}"],
        }
        for i in range(20)
    ]
    for name, rows in (("asked", documents[:42]), ("more", documents[38:])):
        (root / name).mkdir()
        (root / name / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "asked" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return f"{root / 'asked'}, {root / 'more'}"


def settings(folders, steps, **data):
    return {
        "model": {
            "hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "mlp_size": 48,
            "chunk_size": 16, "top_k_documents": 1, "router_layers": (1,),
        },
        "tokenizer": {"vocab_size": 600, "id_digits": 3},
        "data": {
            "source": "jsonl", "folder": folders, "titles": True, "samples": "question", "pair_fraction": 0.7,
            "hidden_fraction": 0.5, "eval_fraction": 0.5, "document_len": 64, "num_documents": 40, "num_questions": 12,
            "question_len": 48, **data,
        },
        "training": {
            "phases": [{"steps": steps, "lm_weight": 0.0, "aux_weight": 1.0}],
            "optimizer": {"name": "muon", "learning_rate": 0.02, "warmup_steps": 2},
            "embedding_std": 0.5, "logit_scale": 0.1, "tied_router": True, "max_targets": 1, "log_every": 1,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """A run that has its tokenizer and the parameters of its start, which match words already."""
    run = RunConfig.from_dict(settings(folders, 8))
    workdir = tmp_path_factory.mktemp("run")
    check_workdir(run, workdir)
    tokenizer = open_tokenizer(run, workdir, train=True)
    model = make_model(run, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        for module in (mine, evaluate, export):
            patch.setattr(module, "load_model", lambda *_: (model, Renderer(tokenizer, run.data.document_len)))
        yield run, workdir, tokenizer, model


def arguments(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, words)])


def test_batches_have_questions_alone_and_the_loss_is_the_router_s(run):
    run, _, tokenizer, model = run
    source = make_source(run.data, tokenizer, "train")
    data = run.data
    batch = next(iter(make_dataset(
        source, tokenizer, num_documents=data.num_documents, num_questions=data.num_questions, chunk_size=16,
        row_len=64, question_len=data.question_len, samples=data.samples, seed=0,
    )))  # fmt: skip
    asked = batch.questions
    assert not asked.loss_weights.any() and not (asked.roles == REPLY).any() and asked.relevant.any(1).all()
    phase = phase_values(phase_at(run.training.phases, 0))
    graphdef, state = nnx.split(model)
    compute = jax.jit(lambda s, batch: loss_and_metrics(nnx.merge(graphdef, s), batch, phase, (1,), run.training))
    loss, (metrics, _) = compute(state, batch)
    assert metrics["lm_loss"] == 0 and loss == metrics["aux_loss"] > 0.01


def test_negatives_are_mined_and_a_run_goes_on_with_them(run, folders, tmp_path, monkeypatch, capsys):
    _, workdir, _, model = run
    out, export = tmp_path / "negatives.jsonl", tmp_path / "export"
    arguments(monkeypatch, "--workdir", workdir, "--out", out, "--export", export, "--most", 30)
    assert mine.main() == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 30 and all(len(row["negatives"]) == 8 for row in rows)
    assert mine.main() == 1 and "exists; remove it" in capsys.readouterr().err
    arguments(monkeypatch, "--workdir", tmp_path, "--out", out)
    assert mine.main() == 1 and "no trained run there" in capsys.readouterr().err

    further = settings(folders, 1, hard_negatives=str(out), num_negatives=2)
    further |= {"init_from": str(export), "tokenizer": {"path": str(export), "id_digits": 3}}
    run = RunConfig.from_dict(further)
    tokenizer = open_tokenizer(run, tmp_path / "further", train=True)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(make_model(run, tokenizer)), nnx.state(model))
    source = make_source(run.data, tokenizer, "train")
    mined = {row["question"]: set(row["negatives"]) for row in rows}
    slot = next(i for i, question in enumerate(source.questions) if question.id in mined)
    held = {document.id for document in source.episode([slot], 4, np.random.default_rng(0)).documents}
    assert len(held & mined[source.questions[slot].id]) >= 2

    # Once it is begun, a run needs no longer what it went on from.
    check_workdir(run, tmp_path / "further")
    export.rename(tmp_path / "moved")
    stored = types.SimpleNamespace(restore_params=lambda *_, **__: nnx.as_pure(nnx.state(model)), close=lambda: None)
    monkeypatch.setattr(opening, "Checkpoints", lambda *_, **__: stored)
    again, _ = opening.load_model(opening.open_run(tmp_path / "further"), tmp_path / "further")
    assert again.config == model.config
    with pytest.raises(ConfigError, match="no such file; give a checkpoint folder"):
        train_run(run, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_run_is_exported(run, tmp_path, monkeypatch, capsys):
    _, workdir, _, model = run
    out = tmp_path / "out"
    assert export.main(["--workdir", str(workdir), "--out", str(out)]) == 0
    there = pretrained.load_model(out)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(there), nnx.state(model))
    assert export.main(["--workdir", str(workdir), "--out", str(out)]) == 1 and "exists" in capsys.readouterr().err
    assert export.main(["--workdir", str(tmp_path), "--out", str(out / "new")]) == 1
    assert "no trained run there" in capsys.readouterr().err and not (out / "new").exists()


def tabled(*words):
    """Rows that `eval.py --task=questions` writes."""
    main(["--task=questions", *map(str, words)])
    return json.loads(pathlib.Path(words[-1].partition("=")[2]).read_text())["rows"]


def test_questions_become_a_table_and_a_figure(run, folders, tmp_path, capsys):
    _, workdir, _, _ = run
    file = tmp_path / "questions.json"
    rows = tabled(f"--workdir={workdir}", "--baselines=bag_of_words", f"--json={file}")
    assert (workdir / "eval_questions.png").stat().st_size > 5000
    assert [(row["bank"], row["retriever"]) for row in rows] == [
        (bank, name) for bank in ("own", "all") for name in ("bm25", "bag_of_words", "router", "router+bm25")
    ]
    assert {row["documents"] for row in rows} == {42, 60} and len({row["questions"] for row in rows}) == 1
    assert 0 < rows[0]["questions"] < 20  # what training never saw
    for row in rows:
        values = [row[f"recall@{k}"] for k in (1, 2, 5, 10, 16)]
        assert values == sorted(values) and values[0] <= 50 and row["all@16"] <= values[-1] <= 100
        # Titles are in the questions, so whoever matches words finds them.
        assert row["recall@16"] > 60
    assert "| recall@16, % |" in capsys.readouterr().out

    # Folders that it was not trained on: all their questions. Without a run it is BM25 alone.
    (tmp_path / "other").mkdir()
    for name in ("documents.jsonl", "questions.jsonl"):
        (tmp_path / "other" / name).write_text((pathlib.Path(folders.split(",")[0]) / name).read_text())
    rows = tabled(f"--workdir={workdir}", f"--folder={tmp_path / 'other'}", f"--json={file}")
    assert [(row["set"], row["bank"], row["questions"]) for row in rows] == [("other", "own", 20)] * 3
    (alone,) = tabled(f"--folder={tmp_path / 'other'}", f"--json={file}")
    assert alone == rows[0] and alone["retriever"] == "bm25"
    with pytest.raises(SystemExit, match="no folder has a questions.jsonl"):
        tabled(f"--folder={folders.split(', ')[1]}", f"--json={file}")
    with pytest.raises(SystemExit, match="give --workdir"):
        tabled(f"--folder={tmp_path / 'other'}", "--baselines=bag_of_words", f"--json={file}")


def test_a_router_alone_has_no_replies_to_learn(folders):
    wrong = settings(folders, 3)
    wrong["training"]["phases"][0]["lm_weight"] = 0.1
    with pytest.raises(ConfigError, match="set lm_weight of every phase to 0"):
        RunConfig.from_dict(wrong)
    with pytest.raises(ConfigError, match="no replies that could refuse"):
        RunConfig.from_dict(settings(folders, 3, unanswerable=0.1))
    with pytest.raises(ConfigError, match="data.hidden_fraction in"):
        RunConfig.from_dict(settings(folders, 3, hidden_fraction=1.5))
