"""Scores of answers and of retrieved documents, and the log of a run."""

from __future__ import annotations

import collections
import json
import pathlib
import re
import string
from collections.abc import Mapping, Sequence

import tensorboardX

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (the convention of SQuAD, arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals any answer after normalisation, else 0."""
    return float(any(normalise_answer(prediction) == normalise_answer(a) for a in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best harmonic mean of word precision and recall against any answer; 0 without answers."""
    words = normalise_answer(prediction).split()

    def score(answer):
        gold = normalise_answer(answer).split()
        if not words or not gold:
            return float(words == gold)
        common = sum((collections.Counter(words) & collections.Counter(gold)).values())
        return 2.0 * common / (len(words) + len(gold))

    return max((score(a) for a in answers), default=0.0)


def string_match(prediction: str, wanted: Sequence[str]) -> float:
    """Share of the wanted strings that occur in the prediction, letter case aside (RULER's measure, arXiv
    2404.06654); 0 without wanted strings."""
    prediction = prediction.lower()
    return sum(text.lower() in prediction for text in wanted) / len(wanted) if wanted else 0.0


def precision_recall(predicted: Sequence, relevant: Sequence) -> tuple[float, float]:
    """Of two sets of document ids; precision of an empty prediction is 0, recall of nothing relevant is 1."""
    predicted, relevant = set(predicted), set(relevant)
    hits = len(predicted & relevant)
    return hits / len(predicted) if predicted else 0.0, hits / len(relevant) if relevant else 1.0


class RunLog:
    """`metrics.jsonl` and TensorBoard of a run. A run that resumes drops what it logged after its checkpoint.

    Args:
      workdir: folder of the run; `metrics.jsonl` and `tensorboard/` are made in it.
      resumed_step: steps already done; later lines are from a run that was cut off, and go.
    """

    def __init__(self, workdir: str | pathlib.Path, *, resumed_step: int = 0):
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = []
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a killed run
                if record["step"] <= resumed_step:
                    kept.append(line + "\n")
        self._path.write_text("".join(kept))
        self._file = self._path.open("a")
        self._writer = tensorboardX.SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._writer.close()
