"""Scores of a trained run at several sizes of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from msa_jax import distributed
from msa_jax.bank import encode_bank
from msa_jax.bank.spread import spread
from msa_jax.data import Question, Renderer
from msa_jax.evaluation.memories import Memory, build_memory
from msa_jax.evaluation.plots import plot_curve
from msa_jax.evaluation.scores import exact_match, f1, precision_recall
from msa_jax.files import write_text
from msa_jax.inference.answer import Answer
from msa_jax.inference.engine import Engine
from msa_jax.inference.library import FixedLibrary
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig
from msa_jax.memory import MemoryBank
from msa_jax.model import MSATransformer
from msa_jax.runs.build import make_source
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model
from msa_jax.sharding import Shardings, check_model, placed

_LOG = logging.getLogger(__name__)
_RECALL = (1, 5, 10, 16)
_CONTEXT_MULTIPLE = 64
_COLUMNS = (
    ("memory_tokens", "memory tokens", "{:,}"),
    ("documents", "documents", "{:,}"),
    ("exact_match", "exact match", "{:.3f}"),
    ("f1", "F1", "{:.3f}"),
    ("id_exact_match", "ids exact", "{:.3f}"),
    ("router_recall@1", "router recall@1", "{}"),
    ("router_recall@16", "recall@16", "{}"),
    ("encode_tokens_per_second", "encoded tok/s", "{:,.0f}"),
    ("seconds_per_question", "s/question", "{:.3f}"),
    ("bank_mib", "bank MiB", "{:,.1f}"),
)


def _recall(best: np.ndarray, wanted: set[int], n: int) -> float:
    """Share of the wanted numbers among the first n."""
    return len(wanted & set(best[:n].tolist())) / len(wanted)


class Known(Protocol):
    """What is known of a memory that is asked: its questions, and its documents' numbers and places by id."""

    questions: Sequence[Question]
    numbers: Sequence[int]
    place: Mapping[str, int]


def score(memory: Known, asked: Sequence[int], answers: Iterable[Answer]) -> list[tuple[int, dict[str, Any]]]:
    """Scores of questions by their number."""
    scores = []
    for number, answer in zip(asked, answers, strict=True):
        question = memory.questions[number]
        wanted = {memory.numbers[memory.place[i]] for i in question.supporting_ids}
        named = [event.number for event in answer.events if event.kind in ("read", "cut", "unknown")]
        precision, recall = precision_recall(named, wanted)
        row = {
            "id_exact_match": float(set(named) == wanted),
            "id_precision": precision,
            "id_recall": recall,
            "rounds": float(len(answer.rounds) - 1),
            "answered": float(answer.outcome == "answered"),
        }
        if question.answers:
            row |= {
                "exact_match": exact_match(answer.text, question.answers),
                "f1": f1(answer.text, question.answers),
            }
        best = answer.rounds[0].documents
        row |= {f"router_recall@{n}": [_recall(layer, wanted, n) for layer in best] for n in _RECALL}
        scores.append((number, row))
    return scores


def means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over questions that have a score, of router recall by layer."""
    means = {name: np.mean([row[name] for row in rows if name in row], axis=0) for name in rows[0]}
    return {name: value.round(4).tolist() if value.ndim else float(value) for name, value in means.items()}


def evaluate(run: RunConfig, workdir: str | pathlib.Path, memory_tokens: Sequence[int]) -> list[dict[str, Any]]:
    """One row of scores for every size of memory, in the order given; answers are generated freely.

    With `mesh.memory` or `mesh.model` above 1 the bank is spread over this process's devices, each with its own
    documents. Of several processes each encodes the memory on its own devices and asks every so-manieth batch of
    questions. Batches are those of one process, and so are the answers. All processes return the same.

    Raises:
      ConfigError, DataError, CheckpointError: settings, data or run that do not fit.
    """
    workdir, settings = pathlib.Path(workdir), run.evaluation
    AskConfig(mode=settings.mode)  # before anything is encoded
    distributed.agree(run.to_dict() | {"workdir": str(workdir), "memory_tokens": list(memory_tokens)})
    model, renderer = load_model(run, workdir)
    mesh = _mesh(run, model)
    source = make_source(run.data, renderer.tokenizer, "eval")
    main, rows = distributed.is_main(), []
    for size in memory_tokens:
        memory = build_memory(
            source, renderer,
            memory_tokens=size, num_questions=settings.num_questions,
            chunk_size=model.config.chunk_size, row_len=run.row_len(model.config.chunk_size), seed=settings.seed,
        )  # fmt: skip
        begin = time.monotonic()
        bank = encode_bank(model, memory.packed, rows_per_step=settings.rows_per_step, progress=main)
        asked_of = model
        if mesh is not None:
            shardings = Shardings.inference()
            bank, asked_of = spread(bank, mesh, shardings), placed(model, mesh, shardings)
        jax.block_until_ready(bank)
        encoded = time.monotonic()
        batch, index, count = settings.batch_size, jax.process_index(), jax.process_count()
        mine = [i for i in range(len(memory.questions)) if i // batch % count == index]
        questions = [memory.questions[i].question for i in mine]
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            answers = ask(asked_of, renderer, bank, memory, questions, run)
            progress = tqdm(
                answers, total=len(mine), desc="ask", unit="question", mininterval=1.0, disable=not main
            )  # fmt: skip
            parts = distributed.gather(score(memory, mine, progress))
        scores = means([row for _, row in sorted(sum(parts, []), key=lambda pair: pair[0])])
        asked = time.monotonic()
        rows.append(
            {
                "memory_tokens": size,
                "tokens": memory.tokens,
                "documents": len(memory.numbers),
                "chunks": int(memory.packed.lengths.sum()),
                "questions": len(memory.questions),
                **scores,
                "encode_seconds": encoded - begin,
                "encode_tokens_per_second": memory.tokens / (encoded - begin),
                "seconds_per_question": (asked - encoded) / len(memory.questions),
                "bank_mib": bank.nbytes / 2**20,
            }
        )
        shown = {name: scores[name] for name in ("exact_match", "id_exact_match") if name in scores}
        _LOG.info("%s tokens of memory: %s", f"{size:,}", shown)
    return rows


def ask(
    model: MSATransformer,
    renderer: Renderer,
    bank: MemoryBank,
    memory: Memory,
    questions: Sequence[str],
    run: RunConfig,
) -> Iterator[Answer]:
    """Answers to questions about a memory that `bank` holds, as the run's settings of evaluation have them."""
    settings = run.evaluation
    tokens = settings.max_new_tokens
    # Room for all that `max_rounds` can bring, so that nothing is cut.
    longest = max((len(renderer.prompt(q)[0]) + len(renderer.restated(q)) for q in questions), default=0)
    context = longest + settings.max_rounds * (run.data.document_len + 2 * tokens) + 2 * tokens
    context = -(-context // _CONTEXT_MULTIPLE) * _CONTEXT_MULTIPLE
    library = FixedLibrary(bank, {number: memory.originals[number] for number in memory.numbers})
    config = EngineConfig(slots=settings.batch_size, context=context, reported_documents=max(_RECALL))
    engine = Engine(model, renderer, library, config)
    budget = Budget(rounds=settings.max_rounds, turn_tokens=tokens, answer_tokens=tokens)
    return engine.ask(questions, config=AskConfig(mode=settings.mode, budget=budget))


def _mesh(run: RunConfig, model: MSATransformer) -> jax.sharding.Mesh | None:
    """Over the devices of this process; None: the bank is on one of them."""
    if run.mesh.memory * run.mesh.model == 1:
        return None
    mesh = dataclasses.replace(run.mesh, data=-1).make(jax.local_devices())
    check_model(model.config, mesh)
    return mesh


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    columns = [c for c in _COLUMNS if c[0] in rows[0]]
    lines = [
        "| " + " | ".join(title for _, title, _ in columns) + " |",
        "|" + "---:|" * len(columns),
    ]
    for row in rows:
        cells = [
            " / ".join(f"{v:.3f}" for v in row[name]) if isinstance(row[name], list) else form.format(row[name])
            for name, _, form in columns
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(rows: Sequence[dict[str, Any]], run: RunConfig, workdir: str | pathlib.Path) -> str:
    """Write `eval.json` and `curve.png` into `workdir`; returns the table."""
    workdir = pathlib.Path(workdir)
    record = {"rows": list(rows), "config": run.to_dict()}
    write_text(workdir / "eval.json", json.dumps(record, indent=2) + "\n")
    plot_curve(rows, workdir / "curve.png")
    return table(rows)
