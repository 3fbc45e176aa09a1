"""Tasks of evaluation: one file is one task; what they are given, keep and print."""

import json

import pytest

from msa_jax.errors import ConfigError, DataError
from msa_jax.eval import main
from msa_jax.evaluation import tasks
from msa_jax.evaluation.evaluate import evaluate
from msa_jax.evaluation.report import Column, table
from msa_jax.evaluation.task import Results

NEW = '''"""Counts to the size.

More of it.
"""

import dataclasses

from msa_jax.evaluation.report import Column
from msa_jax.evaluation.task import Task


@dataclasses.dataclass(frozen=True)
class Settings:
    step: int = 1
    names: tuple = ("a",)


def run(inputs):
    for size in inputs.sizes:
        row = {"size": size, "count": size // inputs.settings.step, "names": list(inputs.settings.names)}
        inputs.results.add(row)


TASK = Task(run=run, columns=[Column("count", "counted", "{:,}")], settings=Settings, needs_run=False)
'''


@pytest.fixture
def new(monkeypatch, tmp_path):
    """A task is a file in a folder of the package, and nothing else."""
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    (tmp_path / "countup.py").write_text(NEW)


def test_a_new_task_is_one_file(new, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "countup    Counts to the size." in shown
    for name in ("needles", "ruler", "questions", "babi", "curve"):
        assert f"\n  {name} " in shown
    file = tmp_path / "rows.json"
    main(["--task=countup", "--memory_tokens=4,3000", "--set=step=2", "--set=names=x,y", f"--json={file}"])
    assert json.loads(file.read_text())["rows"][1] == {"size": 3000, "count": 1500, "names": ["x", "y"]}
    assert "| 1,500 |" in capsys.readouterr().out
    for wrong, said in (("step=a", "step must be of type int"), ("size=3", "no setting of this task; there are step")):
        with pytest.raises(ConfigError, match=said):
            evaluate(None, None, [1], task="countup", settings=[wrong])


@pytest.mark.parametrize(
    "task, options, said",
    [
        ("nothing", {}, "there is no such task, there are babi, curve, needles, questions, ruler"),
        ("ruler", {}, "--task=ruler asks a trained run: give --workdir"),
        ("questions", {"baselines": ["dense"]}, "knows no such baseline, it has bm25, bag_of_words"),
        ("babi", {"baselines": ["bm25"]}, "it has none"),
    ],
)
def test_what_cannot_be_asked_is_refused(task, options, said):
    with pytest.raises(ConfigError, match=said):
        evaluate(None, None, [16384], task=task, **options)


def test_rows_are_kept_and_gone_on_from(tmp_path):
    file = tmp_path / "rows.json"
    first = Results(file, {"seed": (1, 2)}, resumes=True)
    first.add({"size": 1, "mode": "a", "score": 0.5})
    again = Results(file, {"seed": (1, 2)}, resumes=True)
    assert again.find(size=1, mode="a") == first.rows[0] and again.find(size=2, mode="a") is None
    with pytest.raises(DataError, match="scores of another model, memory or settings; give another --json"):
        Results(file, {"seed": (1, 3)}, resumes=True)
    # What is asked anew each time leaves the file until all is done.
    anew = Results(file, {}, resumes=False)
    anew.add({"size": 7})
    assert json.loads(file.read_text())["rows"] == first.rows
    anew.write()
    assert json.loads(file.read_text()) == {"rows": [{"size": 7}]}


def test_a_table_shows_the_columns_that_have_values():
    columns = [Column("n", "n", "{:,}"), Column(("a", "b"), "share"), Column("c", "none"), Column("t", "text", "{}")]
    rows = [{"n": 1200, "a": [0.5, 1.0], "t": "x"}, {"n": 3, "b": 0.25, "t": "y"}]
    assert table(rows, columns).splitlines() == [
        "| n | share | text |",
        "|---:|---:|---|",
        "| 1,200 | 0.500 / 1.000 | x |",
        "| 3 | 0.250 | y |",
    ]
