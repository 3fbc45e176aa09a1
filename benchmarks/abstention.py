"""Whether the router's score tells questions that the memory answers from those that it does not.

    python -m benchmarks.abstention --workdir runs/demo [--memory_tokens 16384,65536,262144,1048576] [--questions 128]

Questions of the run's held-out evaluation data: for every size of memory, so many whose document is in it and as many
whose document was left out. All are asked freely, without a threshold; `Answer.score`, the best document's router
score, is then compared between the two. Results go to benchmarks/results/abstention.json (`--out`), the distributions
to docs/images/abstention.png (`--plot`).
"""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.measure import environment, write_json
from benchmarks.separation import CHOSEN, FIRST, HELD_OUT, KEEP, auroc, margin, ranking, separation, used
from msa_jax.bank import encode_bank
from msa_jax.data import Document, Question, Renderer, Source
from msa_jax.evaluation.evaluate import ask, means, score
from msa_jax.evaluation.memories import Memory, build_memory
from msa_jax.evaluation.plots import token_count
from msa_jax.inference.answer import Answer
from msa_jax.model import MSATransformer
from msa_jax.runs.build import make_source
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model, open_run

QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
IN, OUT = "in memory", "not in memory"
# The words of a needle's key, as `NEEDLE` and `QUESTION` have them.
KEY = re.compile(r"magic numbers? for ([a-z]+)-([a-z]+)\b")


class Absent:
    """A source whose memories lack the documents of as many questions as they answer.

    Attributes:
      questions: those without their documents, of the last memory drawn.
    """

    def __init__(self, source: Source):
        self._source = source
        self.questions: list[Question] = []

    def memory(
        self, num_documents: int, num_questions: int, rng: np.random.Generator, *, id_digits: int = 7
    ) -> tuple[list[Question], Iterator[tuple[list[Document], list[int]]]]:
        """See `Source.memory`. There are fewer questions and documents where questions share documents."""
        asked, blocks = self._source.memory(num_documents + num_questions, 2 * num_questions, rng, id_digits=id_digits)
        self.questions = asked[num_questions:]
        left_out = {i for question in self.questions for i in question.supporting_ids}

        def kept() -> Iterator[tuple[list[Document], list[int]]]:
            for documents, numbers in blocks:
                pairs = [(d, n) for d, n in zip(documents, numbers, strict=True) if d.id not in left_out]
                if pairs:
                    yield tuple(map(list, zip(*pairs, strict=True)))

        return [q for q in asked[:num_questions] if left_out.isdisjoint(q.supporting_ids)], kept()


def confusable(memory: Memory, absent: Sequence[Question]) -> np.ndarray | None:
    """Which questions ask for a needle both of whose words are in other needles of the memory; None: no needles."""
    keys = [KEY.search(question.question) for question in absent]
    if not all(keys):
        return None
    there = KEY.findall("\n".join(document.text for document in memory.originals.values()))
    firsts, seconds = {first for first, _ in there}, {second for _, second in there}
    return np.array([key[1] in firsts and key[2] in seconds for key in keys])


def passed(memory: Memory, answers: Sequence[Answer], value: float) -> list[dict[str, str | float]]:
    """The questions that a threshold does not refuse, and the key, else the title, of the document found for each."""
    found = []
    for answer in answers:
        if answer.score >= value:
            document = memory.originals[next(iter(ranking(answer.rounds[0])))]
            key = KEY.search(document.text)
            what = "-".join(key.groups()) if key else document.title
            found.append(dict(question=answer.question, score=answer.score, found=what))
    return found


def unanswerable(answers: Sequence[Answer]) -> dict[str, float]:
    """What the model does without a threshold when it should say that it does not know: shares of its answers."""
    kinds = [{event.kind for event in answer.events} for answer in answers]
    texts = [answer.text.strip() for answer in answers]
    shares = {
        "reads a document": [bool(answer.citations) for answer in answers],
        "names only numbers that no document has": ["unknown" in k and not k & {"read", "cut"} for k in kinds],
        "answers": [bool(text) and answer.outcome == "answered" for text, answer in zip(texts, answers, strict=True)],
        "answers out of what was read": [
            bool(text) and any(text in citation.text for citation in answer.citations)
            for text, answer in zip(texts, answers, strict=True)
        ],
    }
    return {name: float(np.mean(values)) for name, values in shares.items()}


def measure(
    model: MSATransformer, renderer: Renderer, source: Source, run: RunConfig, size: int, questions: int
) -> tuple[dict, dict[str, np.ndarray]]:
    """One row of results, and the scores of both kinds."""
    absent = Absent(source)
    chunk, settings = model.config.chunk_size, run.evaluation
    memory = build_memory(
        absent, renderer,
        memory_tokens=size, num_questions=questions, chunk_size=chunk, row_len=run.row_len(chunk), seed=settings.seed,
    )  # fmt: skip
    bank = encode_bank(model, memory.packed, rows_per_step=settings.rows_per_step, progress=True)
    texts = [question.question for question in memory.questions + absent.questions]
    answers = ask(model, renderer, bank, memory, texts, run)
    answers = list(tqdm(answers, total=len(texts), desc="ask", unit="question", mininterval=1.0))
    n = len(memory.questions)
    scores = {IN: np.array([a.score for a in answers[:n]]), OUT: np.array([a.score for a in answers[n:]])}
    margins = np.array([margin(answer.rounds[0]) for answer in answers])
    answered = means([row for _, row in score(memory, range(n), answers[:n])])
    row = {
        "memory_tokens": size,
        "tokens": memory.tokens,
        "documents": len(memory.numbers),
        "questions": {name: len(values) for name, values in scores.items()},
        "quantiles": {name: dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True))
                      for name, values in scores.items()},
        "score": separation(scores[IN], scores[OUT]),
        "margin": separation(margins[:n], margins[n:]),
        "answerable, without a threshold": {
            name: answered[name] for name in ("exact_match", "id_exact_match") if name in answered
        },
        "unanswerable, without a threshold": unanswerable(answers[n:]),
    }  # fmt: skip
    row["unanswerable, not refused"] = passed(memory, answers[n:], row["score"][CHOSEN]["value"])
    if (hard := confusable(memory, absent.questions)) is not None:
        row["both words in other needles"] = {"share": float(hard.mean())} | {
            f"auroc of {name}": auroc(scores[IN], scores[OUT][part]) if part.any() else None
            for name, part in (("these", hard), ("the others", ~hard))
        }
    return row, scores | {"margin " + IN: margins[:n], "margin " + OUT: margins[n:]}


def carry_over(rows: Sequence[dict], scores: Sequence[dict[str, np.ndarray]]) -> None:
    """Add to every row what the first row's thresholds do there."""
    for kind, prefix in (("score", ""), ("margin", "margin ")):
        value = rows[0][kind][CHOSEN]["value"]
        for row, found in zip(rows, scores, strict=True):
            row[kind][FIRST] = used(value, found[prefix + IN], found[prefix + OUT])


def table(rows: Sequence[dict]) -> str:
    """Rows as a Markdown table."""
    titles = ("memory tokens", "by", "AUROC", "threshold", "kept", "refused", "held out: kept", "refused",
              "first threshold: kept", "refused", "best accuracy")  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---:|---|" + "---:|" * (len(titles) - 2)]
    for row in rows:
        for kind in ("score", "margin"):
            found = row[kind]
            shares = [found[name][share] for name in (CHOSEN, HELD_OUT, FIRST) for share in ("kept", "refused")]
            shares.append(found["best accuracy"]["accuracy"])
            cells = [f"{row['memory_tokens']:,}", kind, f"{found['auroc']:.4f}", f"{found[CHOSEN]['value']:.3f}"]
            lines.append("| " + " | ".join([*cells, *(f"{share:.1%}" for share in shares)]) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[dict], scores: Sequence[dict[str, np.ndarray]], path: pathlib.Path) -> None:
    """Every question's score by size of memory, both kinds side by side, and the thresholds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes, rng = figure.subplots(), np.random.default_rng(0)
    for place, (row, found) in enumerate(zip(rows, scores, strict=True)):
        first = dict(label=None) if place else {}
        for name, shift, color in ((IN, -0.2, "tab:blue"), (OUT, 0.2, "tab:orange")):
            x = place + shift + rng.uniform(-0.13, 0.13, len(found[name]))
            axes.plot(x, found[name], ".", color=color, alpha=0.45, markersize=4, **(dict(label=name) | first))
        value = row["score"][CHOSEN]["value"]
        label = dict(label=f"keeps {KEEP:.0%} of those in memory") | first
        axes.plot([place - 0.4, place + 0.4], [value, value], "k-", linewidth=1.2, **label)
    value = rows[0]["score"][FIRST]["value"]
    axes.axhline(value, color="k", linestyle=":", linewidth=1, label="... at the smallest size")
    axes.set_xticks(range(len(rows)), [token_count(row["memory_tokens"]) for row in rows])
    axes.set(xlabel="tokens of memory", ylabel="router score of the best document")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"savefig.dpi": 144}):
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--memory_tokens", default="16384,65536,262144,1048576")
    parser.add_argument("--questions", type=int, default=128, help="of each kind")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/abstention.json"))
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("docs/images/abstention.png"))
    options = parser.parse_args()
    run = open_run(options.workdir)
    model, renderer = load_model(run, options.workdir)
    source = make_source(run.data, renderer.tokenizer, "eval")
    sizes = [int(size) for size in options.memory_tokens.split(",")]
    found = [measure(model, renderer, source, run, size, options.questions) for size in sizes]
    rows, scores = [row for row, _ in found], [values for _, values in found]
    carry_over(rows, scores)
    print(table(rows))
    command = (
        f"python -m benchmarks.abstention --workdir {options.workdir} --memory_tokens {options.memory_tokens} "
        f"--questions {options.questions}"
    )
    write_json(options.out, dict(rows=rows, command=command) | environment())
    plot(rows, scores, options.plot)


if __name__ == "__main__":
    main()
