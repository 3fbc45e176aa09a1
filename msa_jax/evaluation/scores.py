"""Scores of answers and of retrieved documents."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence

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


