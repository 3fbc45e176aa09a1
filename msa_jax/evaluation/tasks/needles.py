"""Held-out documents of the run's own data, a memory drawn for each size; the model answers freely.

With `mesh.memory` or `mesh.model` above 1 the bank is spread over this process's devices, each with its own documents.
Of several processes each encodes the memory on its own devices and asks every so-manieth batch of questions. Batches
are those of one process, and so are the answers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

from msa_jax import distributed
from msa_jax.bank import encode_bank
from msa_jax.bank.spread import spread
from msa_jax.data import Renderer
from msa_jax.errors import ConfigError
from msa_jax.evaluation import baselines
from msa_jax.evaluation.memories import Memory, build_memory
from msa_jax.evaluation.plots import plot_curve
from msa_jax.evaluation.report import Column
from msa_jax.evaluation.scores import RECALL_AT, answer_scores, means, recall
from msa_jax.evaluation.task import Inputs, Row, Task
from msa_jax.inference.corpus import FixedCorpus
from msa_jax.inference.engine import Engine
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig, Mode
from msa_jax.memory import MemoryBank
from msa_jax.model import MSATransformer
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import reconfigured
from msa_jax.sharding import Shardings, check_model, placed

_LOG = logging.getLogger(__name__)
_CONTEXT_MULTIPLE = 64
# Dense attention costs the square of the memory: beyond this it would run for hours, or out of memory.
_DENSE_TOKENS = 65_536

COLUMNS = (
    Column("memory_tokens", "memory tokens", "{:,}"),
    Column("retriever", "retriever", "{}"),
    Column("documents", "documents", "{:,}"),
    Column("exact_match", "exact match"),
    Column("f1", "F1"),
    Column("id_exact_match", "ids exact"),
    Column(("router_recall@1", "recall@1"), "router recall@1"),
    Column(("router_recall@16", "recall@16"), "recall@16"),
    Column("encode_tokens_per_second", "encoded tok/s", "{:,.0f}"),
    Column("seconds_per_question", "s/question"),
    Column("bank_mib", "bank MiB", "{:,.1f}"),
)


def run(inputs: Inputs) -> None:
    """A row for every size, in the order given, then one for every baseline."""
    given, model, renderer = inputs.run, inputs.model, inputs.renderer
    settings = given.evaluation
    if "dense" in inputs.baselines and max(inputs.sizes) > _DENSE_TOKENS:
        raise ConfigError(f"--baselines=dense reads all of the memory at once: ask at most {_DENSE_TOKENS:,} tokens.")
    if inputs.baselines and distributed.several():
        raise ConfigError("--baselines are asked by one process alone: leave them out.")
    mesh = _mesh(given, model)
    for size in inputs.sizes:
        memory = build_memory(
            inputs.source, renderer,
            memory_tokens=size, num_questions=settings.num_questions,
            chunk_size=model.config.chunk_size, row_len=given.row_len(model.config.chunk_size), seed=settings.seed,
        )  # fmt: skip
        begin = time.monotonic()
        bank = encode_bank(
            model, memory.packed, rows_per_step=settings.rows_per_step, progress=distributed.is_main()
        )
        asked_of = model
        if mesh is not None:
            shardings = Shardings.inference()
            bank, asked_of = spread(bank, mesh, shardings), placed(model, mesh, shardings)
        jax.block_until_ready(bank)
        encoded = time.monotonic()
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            scores = _scores(asked_of, renderer, bank, memory, given)
        asked = time.monotonic()
        row = {
            "memory_tokens": size,
            "tokens": memory.tokens,
            "documents": len(memory.numbers),
            "chunks": int(memory.packed.lengths.sum()),
            "questions": len(memory.questions),
        }
        if inputs.baselines:
            row["retriever"] = "router"
        inputs.results.add(
            row
            | scores
            | {
                "encode_seconds": encoded - begin,
                "encode_tokens_per_second": memory.tokens / (encoded - begin),
                "seconds_per_question": (asked - encoded) / len(memory.questions),
                "bank_mib": bank.nbytes / 2**20,
            }
        )
        for name in inputs.baselines:
            inputs.results.add(row | {"retriever": name} | _baseline(name, inputs, bank, memory))
        shown = {name: scores[name] for name in ("exact_match", "id_exact_match") if name in scores}
        _LOG.info("%s tokens of memory: %s", f"{size:,}", shown)


def _scores(model: MSATransformer, renderer: Renderer, bank: MemoryBank, memory: Memory, run: RunConfig) -> Row:
    """Means over all questions, of which each process asks some."""
    batch, index, count = run.evaluation.batch_size, jax.process_index(), jax.process_count()
    mine = [i for i in range(len(memory.questions)) if i // batch % count == index]
    questions = [memory.questions[i] for i in mine]
    engine = _engine(model, renderer, bank, memory, run)
    answers = tqdm(
        engine.ask([q.question for q in questions], config=_asking(run, run.evaluation.mode)),
        total=len(mine), desc="ask", unit="question", mininterval=1.0, disable=not distributed.is_main(),
    )  # fmt: skip
    rows = [
        (i, answer_scores(question, memory.wanted(question), answer))
        for i, question, answer in zip(mine, questions, answers, strict=True)
    ]
    return means([row for _, row in sorted(sum(distributed.gather(rows), []), key=lambda pair: pair[0])])


def _engine(
    model: MSATransformer, renderer: Renderer, bank: MemoryBank | None, memory: Memory, run: RunConfig, slots: int = 0
) -> Engine:
    """With room for all that `max_rounds` can bring, so that nothing is cut."""
    settings, tokens = run.evaluation, run.evaluation.max_new_tokens
    texts = [question.question for question in memory.questions]
    longest = max((len(renderer.prompt(q)[0]) + len(renderer.restated(q)) for q in texts), default=0)
    context = longest + settings.max_rounds * (run.data.document_len + 2 * tokens) + 2 * tokens
    context = -(-context // _CONTEXT_MULTIPLE) * _CONTEXT_MULTIPLE
    corpus = FixedCorpus(bank, {number: memory.originals[number] for number in memory.numbers})
    config = EngineConfig(slots=slots or settings.batch_size, context=context, reported_documents=max(RECALL_AT))
    return Engine(model, renderer, corpus, config)


def _asking(run: RunConfig, mode: Mode, **options: Any) -> AskConfig:
    settings, tokens = run.evaluation, run.evaluation.max_new_tokens
    budget = Budget(rounds=settings.max_rounds, turn_tokens=tokens, answer_tokens=tokens)
    return AskConfig(mode=mode, budget=budget, **options)


def _baseline(name: str, inputs: Inputs, bank: MemoryBank, memory: Memory) -> Row:
    """Means over all questions when something else finds the document; it is read, then the model answers."""
    model, renderer = inputs.model, inputs.renderer
    if name == "dense":
        return _dense(inputs, memory)
    found = baselines.rank(
        name, [memory.originals[n].text for n in memory.numbers], [q.question for q in memory.questions],
        count=max(RECALL_AT), tokenizer=renderer.tokenizer, keys=True,
    )  # fmt: skip
    engine = _engine(model, renderer, bank, memory, inputs.run)
    pending, rows = [], []
    for question, places in zip(memory.questions, found, strict=True):
        best = tuple(memory.numbers[place] for place in places)
        wanted = memory.wanted(question)
        rows.append({f"recall@{n}": recall(best, wanted, n) for n in RECALL_AT})
        pending.append(engine.submit(question.question, config=_asking(inputs.run, "router", given_documents=best[:1])))
    while engine.step():
        pass
    return _answered(memory, pending) | means(rows)


def _dense(inputs: Inputs, memory: Memory) -> Row:
    """The model reads all documents as tokens of its own context, every layer all of them, and there is no bank."""
    whole = copy.copy(inputs.renderer)
    documents = [inputs.renderer.render_document(memory.originals[n], n) for n in memory.numbers]
    whole.prefix = inputs.renderer.prefix + [token for one in documents for token in one]
    # The question's positions follow the documents'.
    model = reconfigured(inputs.model, position_offset=len(whole.prefix))
    engine = _engine(model, whole, None, memory, inputs.run, slots=8)
    config = _asking(inputs.run, "generate")
    pending = [engine.submit(question.question, config=config) for question in memory.questions]
    while engine.step():
        pass
    return _answered(memory, pending)


def _answered(memory: Memory, pending: Sequence[Any]) -> Row:
    rows = [answer_scores(q, memory.wanted(q), p.result()) for q, p in zip(memory.questions, pending, strict=True)]
    return {name: value for name, value in means(rows).items() if not name.startswith("router_")}


def _mesh(run: RunConfig, model: MSATransformer) -> jax.sharding.Mesh | None:
    """Over the devices of this process; None: the bank is on one of them."""
    if run.mesh.memory * run.mesh.model == 1:
        return None
    mesh = dataclasses.replace(run.mesh, data=-1).make(jax.local_devices())
    check_model(model.config, mesh)
    return mesh


TASK = Task(
    run=run, columns=COLUMNS, baselines=(*baselines.RANKERS, "dense"), distributed=True, draw=plot_curve
)  # fmt: skip
