"""RULER's eight needle tasks at growing sizes of memory (arXiv 2404.06654).

    python -m benchmarks.quality.ruler --workdir runs/ruler [--memory_tokens 32768,131072,1048576] [--questions 64]

For every task one memory is encoded into a folder (`--memory`), its needles at their depths within the smallest size,
and a haystack that lies behind it, the same for all tasks in text. The memory of every size is the beginning of both,
so that the same questions are asked at all sizes and only more haystack is added. Answers are generated freely
(`--modes`: further ways of `AskConfig.mode`). The score is RULER's: the share of the wanted values that occur in the
answer. A size that is done is written to benchmarks/results/quality/ruler.json (`--out`) at once, and the same command
goes on from there; the picture goes to docs/images/ruler.png (`--plot`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.measure import commit, environment, write_json
from benchmarks.quality.ruler_report import plot, sizes_of, table
from msa_jax.bank.capacity import capacity_for
from msa_jax.checkpoints.run import Checkpoints
from msa_jax.cli.compilation import keep_programs
from msa_jax.data import Question, Renderer, RulerSource
from msa_jax.data.haystacks.ruler_tasks import TASKS, check_tasks
from msa_jax.data.splits import draw_numbers
from msa_jax.errors import DataError
from msa_jax.evaluation.evaluate import means
from msa_jax.evaluation.grown import GrownMemory, Part
from msa_jax.evaluation.scores import precision_recall, string_match
from msa_jax.inference.answer import Answer
from msa_jax.inference.engine import Engine
from msa_jax.inference.library import FixedLibrary
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig
from msa_jax.model import MSATransformer
from msa_jax.runs.build import make_source
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model, open_run, reconfigured
from msa_jax.runs.workdir import written_settings

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


def engine_of(model: MSATransformer, renderer: Renderer, part: Part, run: RunConfig) -> Engine:
    """An engine with room for a question, four documents and the longest answer."""
    tokens = run.evaluation.max_new_tokens
    context = -(-(run.data.question_len + 2 * tokens) // 64) * 64
    # In steps this fine because padding is scored too, which at these sizes is nearly all the work.
    config = EngineConfig(
        slots=run.evaluation.batch_size, context=context, lengths=tuple(range(32, context, 16)), prefill_rows=8,
        reported_documents=_REPORTED,
    )  # fmt: skip
    return Engine(model, renderer, FixedLibrary(part.bank, part.originals), config)


def ask(engine: Engine, questions: Sequence[Question], run: RunConfig, mode: str) -> Iterable[Answer]:
    tokens = run.evaluation.max_new_tokens
    budget = Budget(
        rounds=run.evaluation.max_rounds, documents=_DOCUMENTS, turn_tokens=tokens, answer_tokens=tokens
    )
    config = AskConfig(mode=mode, budget=budget, router_documents=len(questions[0].supporting_ids))
    return engine.ask([q.question for q in questions], config=config)


class Memories:
    """Encoded memories of the tasks, and the haystacks behind them, which tasks in text share.

    Args:
      sizes: in tokens; questions' documents lie within the first.
      made_of: settings that memories depend on.
    """

    def __init__(
        self, run: RunConfig, model: MSATransformer, renderer: Renderer, source: RulerSource, sizes: Sequence[int],
        folder: pathlib.Path, options: argparse.Namespace, made_of: dict,
    ):  # fmt: skip
        # In bfloat16, in which processors may be faster; questions are asked in the model's own dtype.
        self._encoder, self._renderer = reconfigured(model, dtype="bfloat16"), renderer
        self._source, self._sizes, self._folder, self._made_of = source, sizes, folder, made_of
        self._options, self._rows = options, run.evaluation.rows_per_step
        self._behind: dict[str, GrownMemory] = {}

    def _documents(self, task: str, tokens: float) -> int:
        """How many documents of a task's haystack have so many tokens."""
        numbers, rng = np.arange(_SAMPLE), np.random.default_rng(self._options.seed)
        some = [pair for block in self._source.haystack(task, numbers, rng) for pair in zip(*block, strict=True)]
        return max(1, round(tokens / np.mean([len(self._renderer.render_document(d, n)) for d, n in some])))

    def _grown(self, name: str, count: int, tokens: int | None, questions, blocks) -> GrownMemory:
        """A memory of at most `count` documents that has so many tokens, if that is given, or all its documents."""
        made_of = self._made_of | {"of": name}
        memory = GrownMemory(self._folder / name, self._encoder, self._renderer, documents=count, of=made_of)
        if memory.done < count and (tokens is None or memory.tokens < tokens):
            memory.fill(questions, blocks, rows_per_step=self._rows, tokens=tokens)
        return memory

    def of(self, task: str) -> tuple[GrownMemory, GrownMemory]:
        """A task's memory of a little less than the first size, and the haystack behind it, to the last."""
        haystack, seed = TASKS[task].haystack, self._options.seed
        # By the haystack's first task, so that all that share it have as many documents and the same numbers.
        kind = next(name for name in TASKS if TASKS[name].haystack == haystack and TASKS[name].key == TASKS[task].key)
        first, most = self._documents(kind, 0.97 * self._sizes[0]), self._documents(kind, _LARGEST)
        order, needles = (np.random.default_rng([seed, i, list(TASKS).index(n)]) for i, n in enumerate((kind, task)))
        digits = self._renderer.tokenizer.template.id_digits
        numbers = draw_numbers(order, most, digits)
        questions, blocks = self._source.memory(
            first, self._options.questions, needles, task=task, numbers=numbers[:first]
        )
        memory = self._grown(task, first, None, questions, blocks)
        if kind not in self._behind:
            if haystack == "essay":
                # Where text is gone through again its documents are shorter, and more are needed.
                unused = np.setdiff1d(np.arange(10**digits), numbers)
                numbers = np.append(numbers, np.random.default_rng(seed).choice(unused, most // 4, replace=False))
            step = min(4096, first)
            more = self._source.haystack(task, numbers[first:], order, questions=questions, block_size=step)
            wanted = self._sizes[-1] - memory.tokens
            self._behind[kind] = self._grown(f"behind_{kind}", len(numbers) - first, wanted, [], more)
        return memory, self._behind[kind]


def evaluate_task(
    run: RunConfig, model: MSATransformer, renderer: Renderer, memories: Memories, task: str,
    sizes: Sequence[int], options: argparse.Namespace, done: dict[tuple[str, int, str], dict], save,
) -> None:  # fmt: skip
    """Rows of one task at all sizes and modes that are not done; `save` is called after each."""
    chunk_size, modes = model.config.chunk_size, options.modes.split(",")
    left = {size: [mode for mode in modes if (task, size, mode) not in done] for size in sizes}
    if not any(left.values()):
        return
    memory, behind = memories.of(task)
    for size, missing in left.items():
        if not missing:
            continue
        room = capacity_for(size // 40), capacity_for(size // (chunk_size - 4))
        (part,) = memory.parts(size, behind=behind, room=room)
        engine, questions = engine_of(model, renderer, part, run), memory.questions
        for mode in missing:
            begin = time.monotonic()
            scores = means([score(q, a) for q, a in zip(questions, ask(engine, questions, run, mode), strict=True)])
            done[task, size, mode] = {
                "task": task, "memory_tokens": size, "mode": mode, "tokens": part.tokens,
                "documents": len(part.originals), "questions": len(questions), **scores,
                "ask_seconds": round(time.monotonic() - begin, 1),
                "encoded_behind": behind.done, "encode_seconds": round(behind.seconds, 1),
            }  # fmt: skip
            save()
            shown = {name: scores[name] for name in ("string_match", "ids_exact")}
            _LOG.info("%s at %s tokens, %s: %s", task, f"{size:,}", mode, shown)
        del part, engine
        gc.collect()  # an engine is a ring of references, and there is no room for two banks of the largest size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--memory_tokens", default="32768,131072,1048576")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modes", default="generate", help="of asking, with commas between")
    parser.add_argument("--top_k", type=int, help="documents that a router layer selects; default as trained")
    parser.add_argument("--router_bias_scale", type=float, default=1.0, help="as the model's; default %(default)s")
    parser.add_argument("--memory", type=pathlib.Path, help="folder of encoded memories; default memory in the workdir")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/quality/ruler.json"))
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("docs/images/ruler.png"))
    options = parser.parse_args()
    # An import has set up logging of its own.
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    _LOG.setLevel(logging.INFO)
    sizes, tasks = sorted(map(int, options.memory_tokens.split(","))), options.tasks.split(",")
    check_tasks(tasks)
    run = open_run(options.workdir)
    if run.data.source != "ruler":
        raise DataError(f'{options.workdir} is a run of data.source "{run.data.source}"; give one of "ruler"')
    keep_programs(str(options.workdir / "compiled"))
    model, renderer = load_model(run, options.workdir)
    with contextlib.closing(Checkpoints(options.workdir / "checkpoints")) as checkpoints:
        step = checkpoints.latest_step
    source = make_source(run.data, renderer.tokenizer, "eval")
    # Folders of this machine are left out.
    trained = written_settings(options.workdir) | {"init_from": pathlib.Path(run.init_from).name}
    trained["tokenizer"] = trained["tokenizer"] | {"path": pathlib.Path(run.tokenizer.path).name}
    settings = {
        "smallest": sizes[0], "questions": options.questions, "seed": options.seed, "steps": step, "run": trained,
        "top_k": options.top_k or model.config.top_k, "router_bias_scale": options.router_bias_scale,
    }  # fmt: skip
    done: dict[tuple[str, int, str], dict] = {}
    if options.out.is_file():
        record = json.loads(options.out.read_text())
        if record["settings"] == json.loads(json.dumps(settings)):
            done = {(row["task"], row["memory_tokens"], row["mode"]): row for row in record["rows"]}

    def save() -> None:
        rows = sorted(done.values(), key=lambda row: (list(TASKS).index(row["task"]), row["memory_tokens"]))
        command = f"python -m benchmarks.quality.ruler --workdir runs/{options.workdir.name}"
        given = {
            "memory_tokens": ",".join(map(str, sizes_of(rows))), "questions": options.questions,
            "modes": ",".join(dict.fromkeys(row["mode"] for row in rows)),
            "top_k": options.top_k, "router_bias_scale": options.router_bias_scale,
        }  # fmt: skip
        command += "".join(f" --{name} {value}" for name, value in given.items() if value != parser.get_default(name))
        record = {"command": command, "commit": commit(), "settings": settings, **environment(), "rows": rows}
        write_json(options.out, record)

    made_of = {name: settings[name] for name in ("smallest", "questions", "seed", "steps", "run")}
    folder = options.memory or options.workdir / "memory"
    model = reconfigured(model, top_k=settings["top_k"], router_bias_scale=options.router_bias_scale)
    memories = Memories(run, model, renderer, source, sizes, folder, options, made_of)
    for task in tasks:
        evaluate_task(run, model, renderer, memories, task, sizes, options, done, save)
    for mode in dict.fromkeys(row["mode"] for row in done.values()):
        print(f"{mode}:\n{table([row for row in done.values() if row['mode'] == mode])}")
    plot(list(done.values()), options.plot)


if __name__ == "__main__":
    main()
