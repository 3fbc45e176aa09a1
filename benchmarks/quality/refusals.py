"""Whether a model that was trained on unanswerable questions says so by itself, and what that costs on the others.

    python -m benchmarks.quality.refusals --workdirs runs/demo,runs/abstention [--memory_tokens 16384,262144]

For every run and size: so many held-out questions whose document is in the memory and as many whose document was left
out, asked freely and without a threshold. A question is refused if the answer is the template's `not_found` and no
document was read. For comparison, what the best threshold on the router's score would do on the same questions
(`AskConfig.abstain_below`, chosen to keep 99 % of the answerable ones on one half and used on the other). Results go to
benchmarks/results/quality/refusals.json (`--out`).
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from benchmarks.abstention import Absent
from benchmarks.measure import commit, environment, write_json
from benchmarks.separation import auroc, held_out
from msa_jax.bank import encode_bank
from msa_jax.evaluation.evaluate import ask, means, score
from msa_jax.evaluation.memories import build_memory
from msa_jax.inference.answer import Answer
from msa_jax.runs.build import make_source
from msa_jax.runs.open import load_model, open_run


def refused(answers: Sequence[Answer], says: str) -> np.ndarray:
    """Which answers say that the memory holds none, having read nothing; bool [questions]."""
    return np.array([answer.text == says and not answer.citations for answer in answers])


def measure(workdir: pathlib.Path, sizes: Sequence[int], questions: int) -> dict:
    """A run's results: one row for each size of memory."""
    run = open_run(workdir)
    model, renderer = load_model(run, workdir)
    source, chunk = make_source(run.data, renderer.tokenizer, "eval"), model.config.chunk_size
    says, rows = renderer.tokenizer.template.not_found, []
    for size in sizes:
        absent = Absent(source)
        memory = build_memory(
            absent, renderer,
            memory_tokens=size, num_questions=questions, chunk_size=chunk, row_len=run.row_len(chunk),
            seed=run.evaluation.seed,
        )  # fmt: skip
        bank = encode_bank(model, memory.packed, rows_per_step=run.evaluation.rows_per_step)
        texts = [question.question for question in memory.questions + absent.questions]
        answers = list(ask(model, renderer, bank, memory, texts, run))
        n = len(memory.questions)
        inside, outside = (np.array([answer.score for answer in part]) for part in (answers[:n], answers[n:]))
        right = means([row for _, row in score(memory, range(n), answers[:n])])
        rows.append(
            {
                "memory_tokens": size,
                "documents": len(memory.numbers),
                "questions": {"answerable": n, "unanswerable": len(answers) - n},
                "unanswerable, refused": float(refused(answers[n:], says).mean()),
                "unanswerable, a document read": float(np.mean([bool(a.citations) for a in answers[n:]])),
                "answerable, refused": float(refused(answers[:n], says).mean()),
                "answerable, exact match": right["exact_match"],
                "answerable, ids exact": right["id_exact_match"],
                "answerable, router recall@1 by layer": right["router_recall@1"],
                "by the router's score": {"auroc": auroc(inside, outside), **held_out(inside, outside)},
            }
        )
        print(json.dumps(rows[-1]))
    return {
        "unanswerable in training": run.data.unanswerable, "steps": run.training.steps, "seed": run.training.seed,
        "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdirs", required=True)
    parser.add_argument("--memory_tokens", default="16384,262144")
    parser.add_argument("--questions", type=int, default=128, help="of each kind")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/quality/refusals.json"))
    options = parser.parse_args()
    sizes = [int(size) for size in options.memory_tokens.split(",")]
    workdirs = [pathlib.Path(name) for name in options.workdirs.split(",")]
    runs = {workdir.name: measure(workdir, sizes, options.questions) for workdir in workdirs}
    command = (
        f"python -m benchmarks.quality.refusals --workdirs {','.join(f'runs/{path.name}' for path in workdirs)} "
        f"--memory_tokens {options.memory_tokens} --questions {options.questions}"
    )
    write_json(options.out, {"runs": runs, "command": command, "commit": commit()} | environment())


if __name__ == "__main__":
    main()
