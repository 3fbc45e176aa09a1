"""Runs a task of evaluation on a trained run, and keeps its scores."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence

from msa_jax import distributed
from msa_jax.errors import ConfigError
from msa_jax.evaluation import tasks
from msa_jax.evaluation.report import table
from msa_jax.evaluation.task import Inputs, Results, Row
from msa_jax.inference.settings import AskConfig
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model, open_run
from msa_jax.runs.workdir import differing_settings

_LOG = logging.getLogger(__name__)


def evaluate(
    run: RunConfig | None,
    workdir: str | pathlib.Path | None,
    sizes: Sequence[int] = (),
    *,
    task: str = "needles",
    settings: Sequence[str] = (),
    baselines: Sequence[str] = (),
    folders: Sequence[str | pathlib.Path] = (),
    memory: str | pathlib.Path | None = None,
    out: str | pathlib.Path | None = None,
) -> list[Row]:
    """Scores of a trained run, which are written to a file of JSON too. All processes return the same.

    Args:
      run: its settings; None for those that the workdir has.
      sizes: of memory, in tokens; tasks on folders of documents need none.
      task: one of `tasks.described()`.
      settings: NAME=VALUE of the task's own settings.
      baselines: retrievers to compare with.
      folders: of documents and questions, for tasks that read some.
      memory: folder for a memory that is encoded once; default: in the workdir.
      out: the file; default: eval.json in the workdir, eval_TASK.json for another task than needles.

    Raises:
      ConfigError, DataError, CheckpointError, BankError: settings, data, run or memory that do not fit.
    """
    found = tasks.find(task)
    own = found.settings_of(settings)
    if unknown := set(baselines) - set(found.baselines):
        has = ", ".join(found.baselines) or "none"
        raise ConfigError(f"--baselines={sorted(unknown)[0]}: --task={task} knows no such baseline, it has {has}.")
    if workdir is None and (found.needs_run or run is not None):
        raise ConfigError(f"--task={task} asks a trained run: give --workdir.")
    if distributed.several() and not found.distributed:
        raise ConfigError(f"--task={task} is asked by one process: start one alone.")
    workdir = None if workdir is None else pathlib.Path(workdir)
    given = {"task": task, "settings": own.__dict__, "baselines": list(baselines)}
    given |= {"folders": [pathlib.Path(folder).name for folder in folders]}
    path = pathlib.Path(out) if out else None
    model = renderer = None
    if workdir is not None:
        begun = run is not None and (workdir / "config.json").is_file()
        if others := differing_settings(run, workdir, ("data", "tokenizer")) if begun else []:
            _LOG.warning("%s was trained with other %s: it is asked with those given", workdir, ", ".join(others))
        run = run or open_run(workdir)
        AskConfig(mode=run.evaluation.mode)  # before anything is loaded
        distributed.agree(run.to_dict() | given | {"workdir": str(workdir), "memory_tokens": list(sizes)})
        model, renderer = load_model(run, workdir)
        given["config"] = run.to_dict()
        path = path or workdir / ("eval.json" if task == "needles" else f"eval_{task}.json")
    results = Results(path, given, resumes=found.resumes)
    folders = [pathlib.Path(folder) for folder in folders]
    memory = pathlib.Path(memory) if memory else workdir and workdir / f"memory_{task}"
    found.run(Inputs(sizes, own, results, run, workdir, model, renderer, folders, memory, baselines))
    results.write()
    return results.rows


def report(rows: Sequence[Row], task: str, workdir: str | pathlib.Path | None) -> str:
    """The table of a task's rows; its picture is drawn into the workdir."""
    found = tasks.find(task)
    text = table(rows, found.columns)
    if found.draw is not None and workdir is not None:
        picture = pathlib.Path(workdir) / ("curve.png" if task == "needles" else f"eval_{task}.png")
        found.draw(rows, picture)
        text += f"\n\n{picture}"
    return text
