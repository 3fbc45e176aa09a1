"""Baselines beside a trained model: the same questions answered with documents that somebody else chose, or none.

    python -m benchmarks.quality.baselines --workdirs runs/ablations/base_0,runs/ablations/base_1

Free-running through the engine, for each way of `benchmarks/quality/ways.py`: the router's own documents (modes
"generate", "constrained" and "router"), BM25's best one, the right one, a random one, no text at all (mode "latent"),
and nothing but the question. A "reader" has no bank; "and bank" has the model's memory beside the document. What BM25
finds alone is recorded too. Dense attention is `python -m benchmarks.quality.dense`. `--report` prints the table of
both.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import sys

from benchmarks.quality.ablation_report import spread
from benchmarks.quality.asked import Results, ask_run, memory_of
from benchmarks.quality.ways import bm25_numbers, recall
from msa_jax.cli.compilation import add_flag, keep_programs
from msa_jax.errors import ConfigError
from msa_jax.evaluation.plots import token_count
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model, open_run

OUT = pathlib.Path("benchmarks/results/quality/baselines.json")
WAYS = (
    "generate", "constrained", "router", "BM25 reader", "BM25 and bank", "oracle reader", "oracle and bank",
    "random reader", "random and bank", "latent", "no context",
)  # fmt: skip


def bm25_row(run: RunConfig, workdir: pathlib.Path, memory_tokens: int, num_questions: int) -> dict:
    """What BM25 finds in a memory, by words and with keys as whole words."""
    _, renderer = load_model(run, workdir)
    memory = memory_of(run, renderer, memory_tokens=memory_tokens, num_questions=num_questions)
    row = {"documents": len(memory.numbers), "questions": len(memory.questions)}
    for name, whole in (("words", False), ("whole keys", True)):
        found = bm25_numbers(memory, count=16, whole_keys=whole)
        row |= {f"{name}: recall@{n}": recall(found, memory, n) for n in (1, 16)}
    return row


def table(record: dict) -> str:
    """Markdown: a row for every way and size, answers and documents read, over all runs of the record."""
    rows = [row for run in record["runs"].values() for row in run["rows"] if not row["step"]]
    sizes = sorted({row["memory_tokens"] for row in rows})
    lines = ["| way | " + " | ".join(token_count(size) for size in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for size in sizes:
            mine = [row for row in rows if (row["way"], row["memory_tokens"]) == (way, size)]
            pairs = (spread([row[name] for row in mine]) for name in ("id_exact_match", "exact_match"))
            cells.append(" / ".join(pairs) if mine else "-")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdirs", type=lambda text: [pathlib.Path(one) for one in text.split(",")], default=[])
    parser.add_argument("--memory_tokens", default="16384,262144")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--report", action="store_true")
    add_flag(parser)
    options = parser.parse_args()
    if options.report:
        record = json.loads(options.out.read_text())
        print(table(record))
        print(json.dumps(record.get("bm25", {}), indent=1))
        return
    keep_programs(options.compiled)
    results = Results(options.out, shlex.join(["python", "-m", "benchmarks.quality.baselines", *sys.argv[1:]]))
    sizes, ways = [int(size) for size in options.memory_tokens.split(",")], options.ways.split(",")
    try:
        for workdir in options.workdirs:
            run = open_run(workdir)
            results.run(workdir.name).update(seed=run.training.seed)
            wanted = [(size, way, 0) for size in sizes for way in ways]
            ask_run(results, workdir.name, run, workdir, wanted, options.questions)
        found = results.record.setdefault("bm25", {})
        for size in sizes:
            if options.workdirs and str(size) not in found:
                found[str(size)] = bm25_row(run, workdir, size, options.questions)
                results.write()
    except ConfigError as error:
        raise SystemExit(f"baselines: {error}") from None


if __name__ == "__main__":
    main()
