"""RULER's eight needle tasks at growing sizes of memory (arXiv 2404.06654).

    python -m benchmarks.quality.ruler --workdir runs/ruler [--memory_tokens 32768,131072,1048576] [--questions 64]

For every task one memory is made, its needles at their depths within the smallest size; the memory of every size is
the beginning of it, so that the same questions are asked at all sizes and only more haystack is added. Answers are
generated freely, and at sizes up to `--router_up_to` once more with the documents that the router ranks first
(`router_` fields). The score is RULER's: the share of the wanted values that occur in the answer. A size that is done
is written to benchmarks/results/quality/ruler.json (`--out`) at once, and the same command goes on from there; the
picture goes to docs/images/ruler.png (`--plot`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.measure import commit, environment, write_json
from benchmarks.quality.ruler_memory import GrowingBank
from benchmarks.quality.ruler_report import plot, sizes_of, table
from msa_jax.checkpoint import Checkpoints
from msa_jax.compilation import keep_programs
from msa_jax.data import DataError, Question, Renderer, RulerSource
from msa_jax.data.sources.ruler_tasks import TASKS, check_tasks
from msa_jax.evaluation.evaluate import means
from msa_jax.inference.answer import Answer
from msa_jax.inference.engine import Engine
from msa_jax.inference.library import FixedLibrary
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig
from msa_jax.metrics import precision_recall, string_match
from msa_jax.model import MSATransformer
from msa_jax.run import make_source
from msa_jax.run_config import RunConfig
from msa_jax.trained import load_model

_LOG = logging.getLogger(__name__)
_REPORTED = 16
_SAMPLE = 256
# What memories are drawn for, whichever size is asked: all sizes are the beginning of this one.
_LARGEST = 100_000_000
# Documents that a question may read: four are wanted at most.
_DOCUMENTS = 4


def score(question: Question, answer: Answer) -> dict[str, Any]:
    """Scores of one answer. `ids_exact`: the documents read are the supporting ones, and no others."""
    wanted = set(map(int, question.supporting_ids))
    named = [e.number for round_ in answer.rounds for e in round_.events if e.kind in ("read", "cut", "unknown")]
    _, recall = precision_recall(named, wanted)
    best = answer.rounds[0].documents
    return {
        "string_match": string_match(answer.text, question.wanted),
        "all_values": float(string_match(answer.text, question.wanted) == 1.0),
        "ids_exact": float(set(named) == wanted),
        "ids_recall": recall,
        # Of n documents: those among the n best, as 1 for a single document.
        "router_recall@n": [len(wanted & set(layer[: len(wanted)].tolist())) / len(wanted) for layer in best],
        "router_recall@16": [len(wanted & set(layer[:_REPORTED].tolist())) / len(wanted) for layer in best],
        "answered": float(answer.outcome == "answered"),
    }


def engine_of(model: MSATransformer, renderer: Renderer, grown: GrowingBank, run: RunConfig, size: int) -> Engine:
    """An engine with room for a question, four documents and the longest answer; shapes depend on `size` alone."""
    tokens = run.evaluation.max_new_tokens
    context = run.data.question_len + 2 * tokens
    config = EngineConfig(
        slots=run.evaluation.batch_size, context=-(-context // 64) * 64, lengths=(64, 256), prefill_rows=8,
        reported_documents=_REPORTED,
    )  # fmt: skip
    return Engine(model, renderer, FixedLibrary(grown.bank(size), grown.documents), config)


def ask(engine: Engine, questions: Sequence[Question], run: RunConfig, mode: str) -> Iterable[Answer]:
    tokens = run.evaluation.max_new_tokens
    budget = Budget(
        rounds=run.evaluation.max_rounds, documents=_DOCUMENTS, turn_tokens=tokens, answer_tokens=tokens
    )
    config = AskConfig(mode=mode, budget=budget, router_documents=len(questions[0].supporting_ids))
    return engine.ask([q.question for q in questions], config=config)


def documents_of(source: RulerSource, renderer: Renderer, task: str, sizes: Sequence[int], seed: int) -> list[int]:
    """How many documents of a task's haystack make up each size in tokens."""
    id_digits = renderer.tokenizer.template.id_digits
    _, blocks = source.memory(_SAMPLE, 0, np.random.default_rng(seed), task=task, id_digits=id_digits)
    lengths = [len(renderer.render_document(d, n)) for some in blocks for d, n in zip(*some, strict=True)]
    return [max(1, round(size / np.mean(lengths))) for size in sizes]


def evaluate_task(
    run: RunConfig, model: MSATransformer, renderer: Renderer, source: RulerSource, task: str,
    sizes: Sequence[int], options: argparse.Namespace, done: dict[tuple[str, int], dict], save,
) -> None:  # fmt: skip
    """Rows of one task at all sizes that are not done; `save` is called after each."""
    missing = [size for size in sizes if (task, size) not in done]
    if not missing:
        return
    *counts, most = documents_of(source, renderer, task, [*sizes, max(_LARGEST, sizes[-1])], options.seed)
    questions, blocks = source.memory(
        most, options.questions, np.random.default_rng([options.seed, list(TASKS).index(task)]),
        task=task, needle_documents=counts[0], id_digits=renderer.tokenizer.template.id_digits,
        block_size=min(4096, counts[0]),
    )  # fmt: skip
    grown = GrowingBank(model, renderer, run.row_len(model.config.chunk_size), int8=options.int8)
    stream = ((d, n) for documents, numbers in blocks for d, n in zip(documents, numbers, strict=True))
    for size, count in zip(sizes, counts, strict=True):
        if size > missing[-1]:
            return
        begin = time.monotonic()
        while (have := len(grown.documents)) < count:
            some = [pair for pair, _ in zip(stream, range(min(4096, count - have)), strict=False)]
            grown.add([d for d, _ in some], [n for _, n in some], rows_per_step=run.evaluation.rows_per_step)
        encoded = time.monotonic()
        if size not in missing:
            continue
        engine = engine_of(model, renderer, grown, run, size)
        row = {"task": task, "memory_tokens": size, "tokens": grown.tokens, "documents": count}
        row["questions"] = len(questions)
        for mode in ("generate", "router")[: 1 + (size <= options.router_up_to)]:
            scores = means([score(q, a) for q, a in zip(questions, ask(engine, questions, run, mode), strict=True)])
            chosen = ("string_match", "all_values") if mode == "router" else scores
            row |= {("router_" if mode == "router" else "") + name: scores[name] for name in chosen}
        row |= {"encode_seconds": round(encoded - begin, 1), "ask_seconds": round(time.monotonic() - encoded, 1)}
        done[task, size] = row
        save()
        _LOG.info("%s at %s tokens: %s", task, f"{size:,}", {k: row[k] for k in ("string_match", "ids_exact")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--memory_tokens", default="32768,131072,1048576")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--router_up_to", type=int, default=2**17, help="largest size that is asked in router mode too")
    parser.add_argument("--int8", action="store_true", help="keep the bank as int8, for 100M tokens")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/quality/ruler.json"))
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("docs/images/ruler.png"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sizes, tasks = sorted(map(int, options.memory_tokens.split(","))), options.tasks.split(",")
    check_tasks(tasks)
    run = RunConfig.from_dict(json.loads((options.workdir / "config.json").read_text()))
    if run.data.source != "ruler":
        raise DataError(f'{options.workdir} is a run of data.source "{run.data.source}"; give one of "ruler"')
    keep_programs(str(options.workdir / "compiled"))
    model, renderer = load_model(run, options.workdir)
    with contextlib.closing(Checkpoints(options.workdir / "checkpoints")) as checkpoints:
        step = checkpoints.latest_step
    source = make_source(run.data, renderer.tokenizer, "eval")
    # Folders of this machine are left out.
    trained = run.to_dict() | {"init_from": pathlib.Path(run.init_from).name}
    trained["tokenizer"] = trained["tokenizer"] | {"path": pathlib.Path(run.tokenizer.path).name}
    settings = {
        "smallest": sizes[0], "questions": options.questions, "seed": options.seed, "int8": options.int8,
        "steps": step, "run": trained,
    }  # fmt: skip
    done: dict[tuple[str, int], dict] = {}
    if options.out.is_file():
        record = json.loads(options.out.read_text())
        if record["settings"] == json.loads(json.dumps(settings)):
            done = {(row["task"], row["memory_tokens"]): row for row in record["rows"]}

    def save() -> None:
        asked = ",".join(map(str, sizes_of(list(done.values()))))
        rows = sorted(done.values(), key=lambda row: (list(TASKS).index(row["task"]), row["memory_tokens"]))
        command = "python -m benchmarks.quality.ruler --workdir runs/ruler"
        given = {"memory_tokens": asked, "questions": options.questions, "router_up_to": options.router_up_to}
        command += "".join(f" --{name} {value}" for name, value in given.items())
        record = {"command": command, "commit": commit(), "settings": settings, **environment(), "rows": rows}
        write_json(options.out, record)

    for task in tasks:
        evaluate_task(run, model, renderer, source, task, sizes, options, done, save)
    print(table(list(done.values())))
    plot(list(done.values()), options.plot)


if __name__ == "__main__":
    main()
