"""Questions a second, and how long until the first word: python -m benchmarks.asking --workdir runs/demo

Asks a bank of `--memory_tokens` 1, 8 and 32 questions at a time, each size by an engine of its own that has answered
them once before, and counts compilations after that. Two kinds of questions: the run's own, by Memory Interleave and
by the router, which end when the model ends them; and, by the same model with random weights, answers of
`--answer_tokens` each, which it does not end: what decoding many questions together is worth. Ratios are of one run.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import jax
import numpy as np
from flax import nnx

from benchmarks.measure import environment, write_json
from msa_jax import MSATransformer
from msa_jax.bank import encode_bank
from msa_jax.evaluation.memories import build_memory
from msa_jax.inference import AskConfig, Budget, Engine, EngineConfig, FixedCorpus
from msa_jax.runs.build import make_source
from msa_jax.runs.open import load_model, open_run

LENGTHS = (24, 48, 64, 96, 128, 160, 192, 256)
_COMPILED = "/jax/core/compile/backend_compile_duration"


class _Compilations:
    """How many programs were compiled since it was made."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, name, *_, **__):
        self.count += name == _COMPILED


def measure(engine: Engine, questions: list[str], config: AskConfig, *, at_once: int, repeats: int) -> dict:
    """The best of `repeats` passes over the questions, `at_once` at a time."""
    passes = []
    for _ in range(repeats):
        begin, answers = time.perf_counter(), []
        for first in range(0, len(questions), at_once):
            answers += engine.ask(questions[first : first + at_once], config=config)
        passes.append((time.perf_counter() - begin, answers))
    seconds, answers = min(passes, key=lambda one: one[0])
    tokens = sum(answer.completion_tokens for answer in answers)
    first = [answer.first_token for answer in answers if answer.first_token is not None]
    return {
        "questions at once": at_once,
        "questions a second": round(len(questions) / seconds, 2),
        "tokens a second": round(tokens / seconds, 1),
        "tokens a question": round(tokens / len(questions), 2),
        "seconds to the first token, median": round(float(np.median(first)), 4) if first else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--memory_tokens", type=int, default=1 << 20)
    parser.add_argument("--at_once", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--answer_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/asking_cpu.json"))
    options = parser.parse_args()
    run = open_run(options.workdir)
    trained, renderer = load_model(run, options.workdir)
    chunk, most = trained.config.chunk_size, max(options.at_once)
    memory = build_memory(
        make_source(run.data, renderer.tokenizer, "eval"), renderer, memory_tokens=options.memory_tokens,
        num_questions=most, chunk_size=chunk, row_len=run.row_len(chunk), seed=run.evaluation.seed,
    )  # fmt: skip
    questions = [question.question for question in memory.questions]
    originals = {number: memory.originals[number] for number in memory.numbers}
    random = MSATransformer(trained.config, rngs=nnx.Rngs(0))
    short = Budget(rounds=run.evaluation.max_rounds, turn_tokens=24, answer_tokens=24)
    endless = Budget(answer_tokens=options.answer_tokens)
    cases = {
        "Memory Interleave, trained": (trained, AskConfig(budget=short)),
        "by the router, trained": (trained, AskConfig(mode="router", budget=short)),
        f"{options.answer_tokens} tokens, random weights": (random, AskConfig(mode="latent", budget=endless)),
    }
    compilations, tables = _Compilations(), {}
    for name, (model, config) in cases.items():
        bank = encode_bank(model, memory.packed, rows_per_step=run.evaluation.rows_per_step)
        rows = []
        for at_once in options.at_once:
            shapes = EngineConfig(slots=at_once, context=320, lengths=LENGTHS, prefill_rows=min(8, at_once))
            engine = Engine(model, renderer, FixedCorpus(bank, originals), shapes)
            some = questions[: max(at_once, 8)]
            for first in range(0, len(some), at_once):
                list(engine.ask(some[first : first + at_once], config=config))
            before = compilations.count
            row = measure(engine, some, config, at_once=at_once, repeats=options.repeats)
            row["compilations after warm-up"] = compilations.count - before
            rows.append(row)
            print(f"{name}: {row}", flush=True)
        for row in rows:
            row["throughput, of one at a time"] = round(row["tokens a second"] / rows[0]["tokens a second"], 2)
        tables[name] = rows
    command = " ".join(
        map(str, ("python -m benchmarks.asking --workdir", options.workdir, "--memory_tokens", options.memory_tokens))
    )
    results = dict(tokens=memory.tokens, documents=len(originals), cases=tables)
    write_json(options.out, results | environment() | dict(command=command))


if __name__ == "__main__":
    main()
