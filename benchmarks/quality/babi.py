"""bAbI's test questions (arXiv 1502.05698), asked freely through the engine: answers, and the documents of each hop.

    python -m benchmarks.quality.babi --workdir runs/babi [--part test] [--ways interleave,constrained,one_routing]

A question sees the statements of its own story before it. "interleave": the model names documents, round by round;
"constrained": the same, held to those it was routed to; "one_routing": as many as there are hops are read, those that
the router ranks first for the question alone, then it answers. For each task and way: answers that are right, ids that
are right in each hop, whole chains, and, of the routing before each hop, how often the wanted statement is the best of
a router layer. Results go to benchmarks/results/quality/babi.json (`--out`), under the name of the workdir beside those
of other runs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.measure import commit, environment, write_json
from msa_jax.data.sources.babi import BabiSource, Story, read_stories
from msa_jax.errors import DataError
from msa_jax.evaluation.scores import exact_match
from msa_jax.evaluation.stories import StoryLibrary
from msa_jax.inference.answer import Answer
from msa_jax.inference.engine import Engine
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model, open_run

ENGINE = EngineConfig(slots=64, context=112, lengths=(16, 48, 80), prefill_rows=32, decode_steps=6)
WAYS = {"interleave": "generate", "constrained": "constrained", "one_routing": "router"}


def kind(story: Story, place: int) -> str:
    """What the second hop of a question takes: "" for a single hop."""
    question = story.questions[place]
    if len(question.supporting_ids) < 2:
        return ""
    texts = {document.id: document.text for document in story.documents}
    first, second = question.supporting_ids
    who, lines = texts[first].split()[0], [int(i.rsplit(":", 1)[1]) for i in (first, second)]
    later = [
        n for n, d in zip(story.numbers, story.documents, strict=True)
        if d.text.startswith(who) and " to the " in d.text and lines[1] < n < story.asked_at[place]
    ]  # fmt: skip
    return "an earlier place of the person" if later else "the person's latest place"


def asked(engine: Engine, stories: Sequence[Story], config: AskConfig) -> list[tuple[Story, int, Answer]]:
    """Every question of the stories and what became of it."""
    waiting = [
        (story, i, engine.submit(question.question, namespaces=[f"{story.id}@{line}"], config=config))
        for story in stories
        for i, (question, line) in enumerate(zip(story.questions, story.asked_at, strict=True))
    ]
    while engine.step():
        pass
    return [(story, i, pending.result()) for story, i, pending in waiting]


def row(story: Story, place: int, answer: Answer) -> dict:
    """Scores of one question; lists are by hop."""
    question = story.questions[place]
    wanted = [int(i.rsplit(":", 1)[1]) for i in question.supporting_ids]
    named = [event.number for event in answer.events if event.kind in ("read", "cut", "unknown")]
    hops = range(len(wanted))
    best = [answer.rounds[i].documents[:, 0] if i < len(answer.rounds) else None for i in hops]
    return {
        "answer": exact_match(answer.text, question.answers),
        "id of hop": [float(i < len(named) and named[i] == wanted[i]) for i in hops],
        # Of those whose earlier hops went right: else the routing has another text to go by.
        "router best of hop": [
            (best[i] == wanted[i]).astype(float).tolist() if best[i] is not None and named[:i] == wanted[:i] else None
            for i in hops
        ],
        "chain": float(named == wanted),
        "documents read": float(len(answer.citations)),
        "kind": kind(story, place),
    }


def summary(rows: Sequence[dict]) -> dict:
    """Means over questions, in all and by kind of second hop."""
    hops = range(len(rows[0]["id of hop"]))
    routed = [[row["router best of hop"][i] for row in rows if row["router best of hop"][i] is not None] for i in hops]
    result = {
        "questions": len(rows),
        "answer": float(np.mean([row["answer"] for row in rows])),
        "chain": float(np.mean([row["chain"] for row in rows])),
        "id of hop": [float(np.mean([row["id of hop"][i] for row in rows])) for i in hops],
        "router recall@1 of hop, by layer": [np.mean(p, axis=0).round(4).tolist() if p else [] for p in routed],
        "documents read": float(np.mean([row["documents read"] for row in rows])),
    }
    for name in sorted({row["kind"] for row in rows} - {""}):
        part = [row for row in rows if row["kind"] == name]
        result[f"second hop is {name}"] = {
            "questions": len(part),
            "answer": float(np.mean([row["answer"] for row in part])),
            "chain": float(np.mean([row["chain"] for row in part])),
        }
    return result


def stories_of(run: RunConfig, task: int, part: str) -> list[Story]:
    """Stories of the test files, or those of the training files that are not trained on."""
    if part == "test":
        return read_stories(run.data.settings.folder, task, "test")
    return BabiSource(run.data.settings.folder, (task,), "eval", run.data.eval_fraction).stories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--tasks", default="1,2")
    parser.add_argument("--part", choices=("test", "dev"), default="test")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/quality/babi.json"))
    options = parser.parse_args()
    run = open_run(options.workdir)
    if run.data.source != "babi":
        raise DataError(f"{options.workdir} was trained on {run.data.source}; give the workdir of a run on babi")
    model, renderer = load_model(run, options.workdir)
    record = {
        "command": f"python -m benchmarks.quality.babi --workdir runs/{options.workdir.name} --tasks {options.tasks} "
        f"--part {options.part} --ways {options.ways}",
        "part": options.part, "samples": run.data.samples, "steps": run.training.steps, "seed": run.training.seed,
        "commit": commit(), "results": [],
    }  # fmt: skip
    tasks = {task: stories_of(run, task, options.part) for task in map(int, options.tasks.split(","))}
    # All in one bank, so that everything is compiled once.
    library = StoryLibrary(model, renderer, sum(tasks.values(), []), row_len=run.row_len(model.config.chunk_size))
    engine = Engine(model, renderer, library, ENGINE)
    budget = Budget(rounds=run.evaluation.max_rounds, documents=4, turn_tokens=10, answer_tokens=8)
    for way in options.ways.split(","):
        for task, stories in tasks.items():
            begin = time.monotonic()
            hops = max(len(question.supporting_ids) for story in stories for question in story.questions)
            config = AskConfig(mode=WAYS[way], router_documents=hops, budget=budget)
            rows = [row(*found) for found in asked(engine, stories, config)]
            result = {"task": task, "way": way, **summary(rows), "seconds": time.monotonic() - begin}
            record["results"].append(result)
            print(json.dumps(result, indent=1), flush=True)
            old = json.loads(options.out.read_text()) if options.out.is_file() else {}
            write_json(options.out, {"runs": old.get("runs", {}) | {options.workdir.name: record}} | environment())


if __name__ == "__main__":
    main()
