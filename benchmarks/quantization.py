"""What int8 costs in quality: documents found and logits, of a trained run, against bfloat16 and float32 banks.

    python -m benchmarks.quantization --workdir runs/demo [--documents own|python_docs|FOLDER] [--tokens 1048576]

`own` is the run's held-out evaluation data; `python_docs` is documentation of this Python, asked for by first
sentences; FOLDER has a documents.jsonl and, if you like, a questions.jsonl. Documents are encoded in float32; the
bank is then rounded to bfloat16, and quantised from that, as a bank on disk is. Questions are asked by the model in
bfloat16 and in float32. Results are added to benchmarks/results/quantization.json (`--out`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.measure import environment, write_json
from msa_jax.bank.encoder import encode_bank
from msa_jax.bank.quantization import quantize
from msa_jax.data import Renderer
from msa_jax.data.batch import ROUTING
from msa_jax.evaluation.evaluate import ask as ask_freely
from msa_jax.evaluation.evaluate import means, score
from msa_jax.evaluation.memories import Memory, build_memory
from msa_jax.memory import MemoryBank
from msa_jax.model import MSATransformer
from msa_jax.runs.build import make_source
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model, open_run

BEST, BATCH = 16, 32


def model_in(model: MSATransformer, dtype: str) -> MSATransformer:
    """The model with the same parameters, computing in another dtype."""
    config = model.config.replace(dtype=dtype)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0)))), nnx.state(model))


def banks_of(bank: MemoryBank) -> dict[str, MemoryBank]:
    """The forms of a float32 bank that are compared."""
    half = {name: x.astype(jnp.bfloat16) for name, x in bank.arrays.items() if x is not None}
    bfloat16 = bank.replace(**half)
    return {
        "float32": bank,
        "bfloat16": bfloat16,
        "int8 keys": quantize(bfloat16, content=False),
        "int8 content": quantize(bfloat16, keys=False),
        "int8": quantize(bfloat16),
    }


@functools.partial(jax.jit, static_argnames="graphdef")
def _ask(graphdef, params, prefix, tokens, roles, mask, bank):
    """Document scores [L_r, B, N], and logits [B, V] of the first token of the reply."""
    model: MSATransformer = nnx.merge(graphdef, params)
    b = tokens.shape[0]
    output = model(
        tokens,
        positions=model.config.position_offset + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0),
        mask=jnp.concatenate([jnp.ones((b, len(prefix)), bool), mask], axis=1),
        past=model.encode_template(prefix[None]) if len(prefix) else None,
        bank=bank,
        route=(roles == ROUTING) & mask,
    )
    last = jnp.sum(mask, axis=1) - 1
    return output.document_scores, model.logits(output.hidden[jnp.arange(b), last])


def ask(model: MSATransformer, renderer: Renderer, memory: Memory, bank: MemoryBank) -> tuple[np.ndarray, np.ndarray]:
    """Scores [L_r, Q, N] and logits [Q, V] of all questions, whose number is a multiple of the batch."""
    prompts = [renderer.prompt(question.question) for question in memory.questions]
    width = -(-max(len(tokens) for tokens, _ in prompts) // 16) * 16
    pad = lambda values, fill: np.array([[*v, *[fill] * (width - len(v))] for v in values], np.int32)  # noqa: E731
    tokens = pad([tokens for tokens, _ in prompts], renderer.tokenizer.pad_id)
    roles = pad([roles for _, roles in prompts], -2)
    mask = np.arange(width)[None] < np.array([[len(tokens)] for tokens, _ in prompts])
    prefix = jnp.asarray(renderer.prefix, jnp.int32)
    split = nnx.split(model)
    parts = []
    for first in range(0, len(prompts), BATCH):
        batch = (x[first : first + BATCH] for x in (tokens, roles, mask))
        parts.append(jax.device_get(_ask(*split, prefix, *batch, bank)))
    return np.concatenate([s for s, _ in parts], axis=1), np.concatenate([x for _, x in parts])


def overlap(scores: np.ndarray, wanted: np.ndarray) -> list[float]:
    """For each layer, the part of the `BEST` best documents by `wanted` that is among those by `scores`."""
    best = lambda x: np.argsort(-x, axis=-1, kind="stable")[..., :BEST]  # noqa: E731
    found = (best(scores)[..., :, None] == best(wanted)[..., None, :]).any(axis=-1)
    return found.mean(axis=(1, 2)).round(4).tolist()


def relevant_found(scores: np.ndarray, memory: Memory) -> list[float]:
    """For each layer, the part of the supporting documents among the `BEST` best."""
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :BEST]
    parts = [
        np.isin([memory.place[i] for i in question.supporting_ids], best[layer, row]).mean()
        for layer in range(len(best))
        for row, question in enumerate(memory.questions)
    ]
    return np.reshape(parts, (len(best), -1)).mean(axis=1).round(4).tolist()


def compare(model, renderer, memory, banks, run: RunConfig, *, generate: bool) -> dict[str, dict]:
    """By form of the bank: what is found and how logits change."""
    answers = {name: ask(model, renderer, memory, bank) for name, bank in banks.items()}
    rows = {}
    for name, (scores, logits) in answers.items():
        change = np.abs(logits - answers["bfloat16"][1])
        rows[name] = {
            "recall@16 of bfloat16's": overlap(scores, answers["bfloat16"][0]),
            "recall@16 of float32's": overlap(scores, answers["float32"][0]),
            "supporting documents @16": relevant_found(scores, memory),
            "logits: largest change": round(float(change.max()), 4),
            "logits: mean change": round(float(change.mean()), 5),
            "logits: deviation": round(float(logits.std()), 4),
            "same first token": float(np.mean(logits.argmax(-1) == answers["bfloat16"][1].argmax(-1))),
            "bank MiB": round(banks[name].nbytes / 2**20, 2),
        }
        if generate:
            texts = [question.question for question in memory.questions]
            replies = ask_freely(model, renderer, banks[name], memory, texts, run)
            scored = means([row for _, row in score(memory, range(len(texts)), replies)])
            rows[name] |= {field: scored[field] for field in ("id_exact_match", "exact_match") if field in scored}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--documents", default="own")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/quantization.json"))
    options = parser.parse_args()
    if options.questions % BATCH:
        raise SystemExit(f"--questions must be a multiple of {BATCH}, got {options.questions}.")
    run = open_run(options.workdir)
    model, renderer = load_model(run, options.workdir)
    data, name = run.data, options.documents
    if name == "python_docs":
        data = dataclasses.replace(data, source=name)
    elif name != "own":
        data, name = dataclasses.replace(data, source="jsonl", folder=name), pathlib.Path(name).name
    chunk = model.config.chunk_size
    memory = build_memory(
        make_source(data, renderer.tokenizer, "eval"), renderer,
        memory_tokens=options.tokens, num_questions=options.questions, chunk_size=chunk, row_len=run.row_len(chunk),
        seed=run.evaluation.seed,
    )  # fmt: skip
    # On a CPU a matrix product of float32 is one; elsewhere it may not be.
    jax.config.update("jax_default_matmul_precision", "highest")
    in_dtype = functools.partial(model_in, model)
    banks = banks_of(encode_bank(in_dtype("float32"), memory.packed, rows_per_step=run.evaluation.rows_per_step))
    record = json.loads(options.out.read_text()) if options.out.is_file() else {}
    results = dict(tokens=memory.tokens, documents=banks["int8"].num_documents, questions=len(memory.questions))
    for dtype in ("bfloat16", "float32"):
        freely = name == "own" and dtype == "float32"
        rows = compare(in_dtype(dtype), renderer, memory, banks, run, generate=freely)
        results[f"questions in {dtype}"] = rows
        print(f"\n{name}: {memory.tokens:,} tokens, {results['documents']:,} documents; questions in {dtype}")
        for form, values in rows.items():
            print(f"  {form:13}" + ", ".join(f"{what} {value}" for what, value in values.items()))
    asked = ("--workdir", options.workdir, "--documents", name, "--tokens", options.tokens)
    command = " ".join(map(str, ("python -m benchmarks.quantization", *asked, "--questions", options.questions)))
    results |= environment() | dict(command=command)
    write_json(options.out, record | {f"{options.workdir.name}, {name}": results})


if __name__ == "__main__":
    main()
