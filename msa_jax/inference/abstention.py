"""Choosing below which router score a question counts as not answered by the memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A value for `AskConfig.abstain_below` and what it does to the scores that it was chosen on.

    Attributes:
      value: questions whose best document scores below it are refused.
      kept: share of the questions with an answer in the memory that are not refused.
      refused: share of the others that are; None when there were none to try.
    """

    value: float
    kept: float
    refused: float | None


def choose_threshold(
    in_memory_scores: Iterable[float], not_in_memory_scores: Iterable[float] | None = None, *, keep: float = 0.99
) -> Threshold:
    """The threshold that keeps at least `keep` of the answerable questions and refuses the most of the others.

    Of several such, the one that keeps the most; without the others' scores, the one that keeps the least. It lies half
    way between the lowest score that stays and the next lower one, so that rounding moves no question over it; where
    nothing is lower, it is that lowest score.

    Args:
      in_memory_scores: `Answer.score` of questions whose answer is in the memory.
      not_in_memory_scores: of questions whose answer is not; without them `refused` is not known.
      keep: above 0, at most 1. With n scores, (1 - keep) n of them, rounded down, may be lost.

    Raises:
      ValueError: no scores, scores that are not finite numbers, or `keep` out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"choose_threshold: keep must be above 0 and at most 1, got {keep!r}.")
    wanted = _scores("in_memory_scores", in_memory_scores)
    unwanted = None if not_in_memory_scores is None else _scores("not_in_memory_scores", not_in_memory_scores)
    n = len(wanted)
    fewest = math.ceil(keep * n)
    if (fewest - 1) / n >= keep:  # keep * n was rounded up past a whole number
        fewest -= 1
    lowest = np.sort(wanted)[n - fewest]
    refusable = wanted if unwanted is None else unwanted
    below = refusable[refusable < lowest]
    if unwanted is not None:
        lowest = wanted[wanted > below.max(initial=-np.inf)].min()
    value = float(lowest)
    if len(below):
        middle = float(below.max() / 2 + lowest / 2)
        if below.max() < middle <= lowest:  # else they are neighbours, with nothing in between
            value = middle
    return Threshold(
        value=value,
        kept=float(np.mean(wanted >= value)),
        refused=None if unwanted is None else float(np.mean(unwanted < value)),
    )


def _scores(name: str, values: Iterable[float]) -> np.ndarray:
    values = list(values)
    if not values:
        raise ValueError(f"choose_threshold: {name} is empty: give the score of one question at least.")
    wrong = [v for v in values if v is None or not math.isfinite(v)]
    if wrong:
        raise ValueError(
            f"choose_threshold: {name} must be finite numbers, got {wrong[0]!r}; an answer has no score when there is "
            "no document for its question."
        )
    return np.array(values, np.float64)
