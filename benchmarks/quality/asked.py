"""Runs that are asked at sizes of memory in several ways, into one JSON file that is rewritten after each.

Everything that is in the file already is left as it is, so the same command goes on after any interruption.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.measure import commit, environment, write_json
from benchmarks.quality.ways import answers, find_way, scores
from msa_jax.bank import encode_bank
from msa_jax.errors import DataError
from msa_jax.evaluation.memories import Memory, build_memory
from msa_jax.runs.build import make_source
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model

Key = tuple[int, str, int]


class Results:
    """A JSON file of rows by run: `{"command", "commit", "device", "versions", "runs": {name: {..., "rows": []}}}`."""

    def __init__(self, path: str | pathlib.Path, command: str):
        self.path = pathlib.Path(path)
        self.record = json.loads(self.path.read_text()) if self.path.is_file() else {"runs": {}}
        commands = self.record.get("commands", [])
        self.record["commands"] = commands + [command] * (command not in commands)
        self.record |= environment()

    def run(self, name: str) -> dict[str, Any]:
        """What is known of a run, to be added to."""
        return self.record["runs"].setdefault(name, {"rows": []})

    def missing(self, name: str, wanted: Sequence[Key]) -> list[Key]:
        """What of (memory tokens, way, step) is not there yet."""
        there = {(row["memory_tokens"], row["way"], row["step"]) for row in self.run(name)["rows"]}
        return [key for key in wanted if key not in there]

    def write(self) -> None:
        write_json(self.path, self.record)


def memory_of(run: RunConfig, renderer, *, memory_tokens: int, num_questions: int) -> Memory:
    """The memory that evaluation has at this size, with as many of the questions as it has documents for."""
    source = make_source(run.data, renderer.tokenizer, "eval")
    chunk_size = run.model_config(renderer.tokenizer.vocab_size).chunk_size
    row_len = run.row_len(chunk_size)
    fewer = min(num_questions, memory_tokens // row_len)
    if not fewer:
        raise DataError(f"{memory_tokens} tokens of memory hold no document of {row_len} tokens; ask for more.")
    return build_memory(
        source, renderer,
        memory_tokens=memory_tokens, num_questions=fewer, chunk_size=chunk_size, row_len=row_len,
        seed=run.evaluation.seed,
    )  # fmt: skip


def ask_run(
    results: Results, name: str, run: RunConfig, workdir: pathlib.Path, wanted: Sequence[Key], num_questions: int
) -> None:
    """Ask a trained run all that is missing, encoding each memory once, and write the file after every row.

    Args:
      wanted: memory tokens, way of `WAYS`, and step of the checkpoint, 0 for the latest.

    Raises:
      ConfigError, DataError, CheckpointError: an unknown way, a memory too small, no such checkpoint.
    """
    missing = results.missing(name, wanted)
    for _, way, _ in missing:
        find_way(way)
    for step in sorted({step for _, _, step in missing}):
        model, renderer = load_model(run, workdir, step or None)
        for size in sorted({size for size, _, at in missing if at == step}):
            memory = memory_of(run, renderer, memory_tokens=size, num_questions=num_questions)
            names = [way for at_size, way, at in missing if (at_size, at) == (size, step)]
            bank = None
            if any(find_way(way).bank != "none" for way in names):
                bank = encode_bank(model, memory.packed, rows_per_step=run.evaluation.rows_per_step)
                jax.block_until_ready(bank)
            for way in names:
                told = answers(
                    model, renderer, bank, memory, find_way(way), turn_tokens=run.evaluation.max_new_tokens
                )
                row = {
                    "memory_tokens": size, "way": way, "step": step, "tokens": memory.tokens,
                    "documents": len(memory.numbers), "questions": len(memory.questions), **scores(memory, told),
                    "commit": commit(),
                }  # fmt: skip
                results.run(name)["rows"].append(row)
                results.write()
                shown = {n: round(row[n], 3) for n in ("exact_match", "id_exact_match") if n in row}
                print(f"{name}, {size:,} tokens, {way}{f', step {step}' * bool(step)}: {shown}", flush=True)
