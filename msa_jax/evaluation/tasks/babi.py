"""bAbI's test questions: answers, and the documents of each hop.

arXiv 1502.05698. A question sees the statements of its own story before it. Ways: "interleave", the model names
documents, round by round; "constrained", the same, held to those it was routed to; "one_routing", as many as there are
hops are read, those that the router ranks first for the question alone, then it answers. For each task and way: answers
that are right, ids that are right in each hop, whole chains, and, of the routing before each hop, how often the wanted
statement is the best of a router layer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from msa_jax.data.sources.babi import BabiSource, Story, read_stories
from msa_jax.errors import ConfigError
from msa_jax.evaluation.report import Column
from msa_jax.evaluation.scores import exact_match
from msa_jax.evaluation.stories import StoryCorpus
from msa_jax.evaluation.task import Inputs, Row, Task
from msa_jax.inference.answer import Answer
from msa_jax.inference.engine import Engine
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig

ENGINE = EngineConfig(slots=64, context=112, lengths=(16, 48, 80), prefill_rows=32, decode_steps=6)
WAYS = {"interleave": "generate", "constrained": "constrained", "one_routing": "router"}

COLUMNS = (
    Column("task", "task", "{}"),
    Column("way", "way", "{}"),
    Column("questions", "questions", "{:,}"),
    Column("answer", "answer"),
    Column("chain", "whole chain"),
    Column("id_of_hop", "id of hop"),
    Column("router_recall@1_of_hop_1", "router recall@1 of hop 1, by layer"),
    Column("router_recall@1_of_hop_2", "of hop 2"),
    Column("documents_read", "documents read", "{:.2f}"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """`tasks`: by number. `part`: "test" files, or "dev", stories of the training files that are not trained on."""

    tasks: tuple[str, ...] = ("1", "2")
    part: str = "test"
    ways: tuple[str, ...] = tuple(WAYS)


def run(inputs: Inputs) -> None:
    """A row for every task and way."""
    inputs.require_source("babi")
    settings, model = inputs.settings, inputs.model
    if unknown := set(settings.ways) - set(WAYS):
        raise ConfigError(f"--set=ways: there is no way {sorted(unknown)[0]!r}, there are {', '.join(WAYS)}.")
    if settings.part not in ("test", "dev"):
        raise ConfigError(f"--set=part must be test or dev, got {settings.part!r}.")
    if not all(task.isdecimal() for task in settings.tasks):
        raise ConfigError(f"--set=tasks must be numbers, got {','.join(settings.tasks)}.")
    tasks = {task: _stories(inputs, int(task)) for task in settings.tasks}
    # All in one bank, so that everything is compiled once.
    row_len = inputs.run.row_len(model.config.chunk_size)
    corpus = StoryCorpus(model, inputs.renderer, sum(tasks.values(), []), row_len=row_len)
    engine = Engine(model, inputs.renderer, corpus, ENGINE)
    budget = Budget(rounds=inputs.run.evaluation.max_rounds, documents=4, turn_tokens=10, answer_tokens=8)
    for way in settings.ways:
        for task, stories in tasks.items():
            begin = time.monotonic()
            hops = max(len(question.supporting_ids) for story in stories for question in story.questions)
            config = AskConfig(mode=WAYS[way], router_documents=hops, budget=budget)
            rows = [score(*found) for found in asked(engine, stories, config)]
            scores = summary(rows) | {"seconds": round(time.monotonic() - begin, 1)}
            inputs.results.add({"task": int(task), "way": way} | scores)


def _stories(inputs: Inputs, task: int) -> list[Story]:
    data = inputs.run.data
    if inputs.settings.part == "test":
        return read_stories(data.settings.folder, task, "test")
    return BabiSource(data.settings.folder, (task,), "eval", data.eval_fraction).stories


def asked(engine: Engine, stories: Sequence[Story], config: AskConfig) -> list[tuple[Story, int, Answer]]:
    """Every question of the stories, by story and index there, and what became of it."""
    waiting = [
        (story, i, engine.submit(question.question, namespaces=[f"{story.id}@{line}"], config=config))
        for story in stories
        for i, (question, line) in enumerate(zip(story.questions, story.asked_at, strict=True))
    ]
    while engine.step():
        pass
    return [(story, i, pending.result()) for story, i, pending in waiting]


def kind(story: Story, index: int) -> str:
    """What the second hop of a question takes: "" for a single hop."""
    question = story.questions[index]
    if len(question.supporting_ids) < 2:
        return ""
    texts = {document.id: document.text for document in story.documents}
    first, second = question.supporting_ids
    who, lines = texts[first].split()[0], [int(i.rsplit(":", 1)[1]) for i in (first, second)]
    later = [
        n for n, d in zip(story.numbers, story.documents, strict=True)
        if d.text.startswith(who) and " to the " in d.text and lines[1] < n < story.asked_at[index]
    ]  # fmt: skip
    return "an earlier place of the person" if later else "the person's latest place"


def score(story: Story, index: int, answer: Answer) -> Row:
    """Scores of one question; lists are by hop."""
    question = story.questions[index]
    wanted = [int(i.rsplit(":", 1)[1]) for i in question.supporting_ids]
    named = [event.number for event in answer.events if event.kind in ("read", "cut", "unknown")]
    hops = range(len(wanted))
    best = [answer.rounds[i].documents[:, 0] if i < len(answer.rounds) else None for i in hops]
    return {
        "answer": exact_match(answer.text, question.answers),
        "id_of_hop": [float(i < len(named) and named[i] == wanted[i]) for i in hops],
        # Of those whose earlier hops went right: else the routing has another text to go by.
        "best_of_hop": [
            (best[i] == wanted[i]).astype(float).tolist() if best[i] is not None and named[:i] == wanted[:i] else None
            for i in hops
        ],
        "chain": float(named == wanted),
        "documents_read": float(len(answer.citations)),
        "kind": kind(story, index),
    }


def summary(rows: Sequence[Row]) -> Row:
    """Means over questions, in all and by kind of second hop."""
    mean = lambda some, name: float(np.mean([row[name] for row in some]))  # noqa: E731
    result: Row = {"questions": len(rows)}
    result |= {name: mean(rows, name) for name in ("answer", "chain", "documents_read")}
    result["id_of_hop"] = np.mean([row["id_of_hop"] for row in rows], axis=0).tolist()
    for hop in range(len(result["id_of_hop"])):
        routed = [row["best_of_hop"][hop] for row in rows if row["best_of_hop"][hop] is not None]
        result[f"router_recall@1_of_hop_{hop + 1}"] = np.mean(routed, axis=0).round(4).tolist() if routed else []
    for name in sorted({row["kind"] for row in rows} - {""}):
        part = [row for row in rows if row["kind"] == name]
        scores = {"questions": len(part), "answer": mean(part, "answer"), "chain": mean(part, "chain")}
        result |= {f"second hop is {name}: {field}": value for field, value in scores.items()}
    return result


TASK = Task(run=run, columns=COLUMNS, settings=Settings)
