"""RULER's eight needle tasks at growing sizes of memory.

arXiv 2404.06654. Every task has a memory of its own, its needles at their depths within the first tokens of it, and a
haystack that lies behind it, the same for all tasks in text: all in one bank, encoded once. The memory of every size is
the beginning of both, so that the same questions are asked at all sizes and only more haystack is added. The score is
RULER's: the share of the wanted values that occur in the answer. A row that is done is kept at once, and the same
command goes on from there.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from msa_jax.data import Question
from msa_jax.data.haystacks.ruler_tasks import TASKS, check_tasks
from msa_jax.evaluation.grown import GrownBank, grown_bank
from msa_jax.evaluation.plots import token_count
from msa_jax.evaluation.report import Column
from msa_jax.evaluation.scores import RECALL_AT, answer_scores, means
from msa_jax.evaluation.task import Inputs, Row, Task
from msa_jax.inference.answer import Answer
from msa_jax.inference.corpus import Corpus
from msa_jax.inference.engine import Engine
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig

_LOG = logging.getLogger(__name__)
_SAMPLE = 256
# Documents that a question may read: four are wanted at most.
_DOCUMENTS = 4
_BLOCK = 4096

COLUMNS = (
    Column("task", "task", "`{}`"),
    Column("mode", "mode", "{}"),
    Column("memory_tokens", "memory", "{:,}"),
    Column("questions", "questions", "{:,}"),
    Column("string_match", "values found"),
    Column("id_exact_match", "ids exact"),
    Column("router_recall@n", "router recall@n"),
    Column("router_recall@16", "recall@16"),
    Column("answered", "answered"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the memories, which go on from where they are only with the same, and of what is asked.

    Attributes:
      tasks: of RULER. questions: of each. seed: of what is drawn.
      first: tokens within which the questions' documents lie. largest: what memories are drawn for.
      modes: as in `AskConfig`.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    questions: int = 64
    seed: int = 1
    first: int = 32_768
    largest: int = 100_000_000
    modes: tuple[str, ...] = ("generate",)


def run(inputs: Inputs) -> None:
    """A row for every task, size and mode."""
    inputs.require_source("ruler")
    settings = inputs.settings
    check_tasks(settings.tasks)
    for mode in settings.modes:
        AskConfig(mode=mode)
    made_of = {name: getattr(settings, name) for name in ("questions", "seed", "first", "largest")}
    bank = grown_bank(inputs, made_of)
    for task in settings.tasks:
        wanted = [
            (size, [m for m in settings.modes if not inputs.results.find(task=task, memory_tokens=size, mode=m)])
            for size in sorted(inputs.sizes)
        ]
        if not any(modes for _, modes in wanted):
            continue
        questions, behind = fill(inputs, bank, task)
        for size, modes in wanted:
            if modes:
                _ask(inputs, bank, (task, behind), questions, size, modes)


def fill(inputs: Inputs, bank: GrownBank, task: str) -> tuple[Sequence[Question], str]:
    """Encode a task's memory of a little less than the first size, and the haystack behind it, to the last.

    Returns:
      The task's questions, and the namespace of the haystack.
    """
    settings, source, renderer = inputs.settings, inputs.source, inputs.renderer
    haystack, key = TASKS[task].haystack, TASKS[task].key
    # By the haystack's first task, so that all that share it have as many documents.
    shared = next(name for name in TASKS if (TASKS[name].haystack, TASKS[name].key) == (haystack, key))
    some = source.haystack(shared, np.arange(_SAMPLE), np.random.default_rng(settings.seed))
    lengths = [len(renderer.render_document(d, n)) for block in some for d, n in zip(*block, strict=True)]
    # Where text is gone through again its documents are shorter, and more are needed.
    tokens = (0.97 * settings.first, 1.25 * settings.largest)
    first, most = (max(1, round(count / np.mean(lengths))) for count in tokens)
    needles = np.random.default_rng([settings.seed, 1, list(TASKS).index(task)])
    questions, blocks = source.memory(
        first, settings.questions, needles, task=task, numbers=np.arange(first), block_size=_BLOCK
    )
    held = bank.fill(task, blocks)
    order = np.random.default_rng([settings.seed, 0, list(TASKS).index(shared)])
    more = source.haystack(shared, np.arange(most), order, questions=questions, block_size=_BLOCK)
    bank.fill(f"behind_{shared}", more, tokens=max(0, max(inputs.sizes) - held))
    return questions, f"behind_{shared}"


def _ask(
    inputs: Inputs, bank: GrownBank, names: tuple[str, str], questions: Sequence[Question], size: int,
    modes: Sequence[str],
) -> None:  # fmt: skip
    """A row for every mode, over all parts that the questions need."""
    scores: dict[str, list[Row]] = {mode: [] for mode in modes}
    seconds, about = dict.fromkeys(modes, 0.0), {}
    ask = functools.partial(_answers, inputs, modes)
    for rows, asked in bank.parts(questions, size, *names):
        some = [questions[i] for i in asked]
        about, answers, wanted = bank.ask(rows, names[0], some, ask)
        for mode, (told, took) in answers.items():
            scores[mode] += [answer_scores(*one) for one in zip(some, wanted, told, strict=True)]
            seconds[mode] += took
    for mode in modes:
        row = {"task": names[0], "memory_tokens": size, "mode": mode, **about, "questions": len(scores[mode])}
        inputs.results.add(row | means(scores[mode]) | {"ask_seconds": round(seconds[mode], 1)})
        _LOG.info("%s at %s tokens, %s: %.3f", names[0], f"{size:,}", mode, inputs.results.rows[-1]["string_match"])


def _answers(
    inputs: Inputs, modes: Sequence[str], corpus: Corpus, questions: Sequence[Question]
) -> dict[str, tuple[list[Answer], float]]:
    """What is answered in each mode, and how many seconds it took."""
    tokens = inputs.run.evaluation.max_new_tokens
    context = -(-(inputs.run.data.question_len + 2 * tokens) // 64) * 64
    # In steps this fine because padding is scored too, which at these sizes is nearly all the work.
    config = EngineConfig(
        slots=inputs.run.evaluation.batch_size, context=context, lengths=tuple(range(32, context, 16)), prefill_rows=8,
        reported_documents=max(RECALL_AT),
    )  # fmt: skip
    engine = Engine(inputs.model, inputs.renderer, corpus, config)
    budget = Budget(
        rounds=inputs.run.evaluation.max_rounds, documents=_DOCUMENTS, turn_tokens=tokens, answer_tokens=tokens
    )  # fmt: skip
    found = {}
    for mode in modes:
        begin = time.monotonic()
        asking = AskConfig(mode=mode, budget=budget, router_documents=len(questions[0].supporting_ids))
        answers = list(engine.ask([question.question for question in questions], config=asking))
        found[mode] = answers, time.monotonic() - begin
    return found


def averages(rows: Sequence[Row], name: str = "string_match") -> dict[int, float]:
    """Mean over tasks at every size at which all tasks were asked that were asked at the smallest."""
    sizes = sorted({row["memory_tokens"] for row in rows})
    by_size = {size: {r["task"]: r[name] for r in rows if r["memory_tokens"] == size} for size in sizes}
    full = by_size[min(by_size)].keys()
    return {size: float(np.mean(list(scores.values()))) for size, scores in by_size.items() if scores.keys() == full}


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Scores of every task against tokens of memory, of the first mode, and the mean over tasks of every mode."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for task, style in zip(TASKS, ("o-", "s-", "^-", "v-", "D-", "P-", "X--", "*--"), strict=True):
        mine = [row for row in rows if (row["task"], row["mode"]) == (task, modes[0])]
        own = sorted((row["memory_tokens"], row["string_match"]) for row in mine)
        if own:
            axes.plot(*zip(*own, strict=True), style, label=task.removeprefix("niah_"), alpha=0.75, linewidth=1)
    for mode, style in zip(modes, ("k-", "k--", "k:", "k-."), strict=False):
        mean = averages([row for row in rows if row["mode"] == mode])
        axes.plot(list(mean), list(mean.values()), style, label=f"mean, {mode}", linewidth=2)
    axes.set_xscale("log")
    axes.set_xticks(sorted({row["memory_tokens"] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: token_count(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens of memory", ylabel="share of wanted values in the answer", ylim=(-0.02, 1.04))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    with matplotlib.rc_context({"savefig.dpi": 144}):
        figure.savefig(path)


TASK = Task(run=run, columns=COLUMNS, settings=Settings, resumes=True, draw=draw)
