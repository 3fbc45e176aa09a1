"""Scores of answers and of retrieved documents."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from msa_jax.data import Question
from msa_jax.errors import DataError
from msa_jax.inference.answer import Answer

# Documents among the best of the first round that recall is told of.
RECALL_AT = (1, 5, 10, 16)

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


def recall(ranking: Sequence[int], wanted: Set[int], k: int) -> float:
    """Share of what is wanted among the first k. Raises DataError when nothing is wanted."""
    if not wanted:
        raise DataError("recall of nothing wanted is not defined; leave out questions without supporting documents")
    return len(wanted & set(ranking[:k])) / len(wanted)


def answer_scores(question: Question, wanted: Set[int], answer: Answer) -> dict[str, Any]:
    """Scores of one answer; docs/evaluation.md says what each is.

    Args:
      wanted: numbers of the documents that support the answer.
    """
    named = [event.number for event in answer.events if event.kind in ("read", "cut", "unknown")]
    precision, found = precision_recall(named, wanted)
    row: dict[str, Any] = {
        "id_exact_match": float(set(named) == wanted),
        "id_precision": precision,
        "id_recall": found,
        "rounds": float(len(answer.rounds) - 1),
        "answered": float(answer.outcome == "answered"),
    }
    if question.wanted:
        row["string_match"] = string_match(answer.text, question.wanted)
        row["all_values"] = float(row["string_match"] == 1)
    elif question.answers:
        row["exact_match"] = exact_match(answer.text, question.answers)
        row["f1"] = f1(answer.text, question.answers)
    best = [layer.tolist() for layer in answer.rounds[0].documents]
    for n in RECALL_AT:
        row[f"router_recall@{n}"] = [recall(layer, wanted, n) for layer in best]
    # Of n documents: those among the n best, as 1 for a single document.
    row["router_recall@n"] = [recall(layer, wanted, len(wanted)) for layer in best]
    return row


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over questions that have a score; of scores by router layer a list. What nothing was measured of is left out."""
    found = {name: np.mean([row[name] for row in rows if name in row], axis=0) for name in rows[0]}
    return {
        name: value.round(4).tolist() if value.ndim else float(value) for name, value in found.items() if value.size
    }
