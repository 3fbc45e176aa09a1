"""How well one number tells questions that the memory answers from those that it does not."""

from __future__ import annotations

import numpy as np

from msa_jax.inference.abstention import choose_threshold
from msa_jax.inference.answer import Round

KEEP = 0.99
CHOSEN, HELD_OUT, FIRST = f"keeping {KEEP:.0%}", "the same, held out", "threshold of the first size"


def ranking(first: Round) -> dict[int, float]:
    """Mean score over router layers by number, best first, of the documents that a routing reports.

    A document that is not among the best of some layer counts there as the last that is.
    """
    shown = [
        {int(n): float(s) for n, s in zip(numbers, scores, strict=True) if n >= 0}
        for numbers, scores in zip(first.documents, first.scores, strict=True)
    ]
    means = {n: float(np.mean([layer.get(n, min(layer.values())) for layer in shown])) for n in set().union(*shown)}
    return dict(sorted(means.items(), key=lambda pair: (-pair[1], pair[0])))


def margin(first: Round) -> float:
    """Mean score of the best document less that of the second best; 0 with fewer than two."""
    best = list(ranking(first).values())[:2]
    return best[0] - best[1] if len(best) == 2 else 0.0


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """How often a score of `inside` is above one of `outside`; equal ones count half."""
    outside = np.sort(outside)
    below, upto = (np.searchsorted(outside, inside, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(outside))


def most_accurate(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """The threshold that decides the most questions rightly, both kinds counting alike, and that share."""
    values = np.unique(np.concatenate([inside, outside]))
    right = [((inside >= value).mean() + (outside < value).mean()) / 2 for value in values]
    best = int(np.argmax(right))
    return dict(value=float(values[best]), accuracy=float(right[best]))


def used(value: float, inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """What a threshold does: shares of answerable questions kept and of the others refused."""
    return dict(value=value, kept=float((inside >= value).mean()), refused=float((outside < value).mean()))


def held_out(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """A threshold chosen on one half of the questions and used on the other: mean of both ways."""
    ways = [
        used(choose_threshold(inside[i::2], outside[i::2], keep=KEEP).value, inside[1 - i :: 2], outside[1 - i :: 2])
        for i in (0, 1)
    ]
    return {name: float(np.mean([way[name] for way in ways])) for name in ("kept", "refused")}


def separation(inside: np.ndarray, outside: np.ndarray) -> dict:
    """How well the scores of both kinds are told apart."""
    chosen = choose_threshold(inside, outside, keep=KEEP)
    return {
        "auroc": auroc(inside, outside),
        CHOSEN: dict(value=chosen.value, kept=chosen.kept, refused=chosen.refused),
        HELD_OUT: held_out(inside, outside),
        "best accuracy": most_accurate(inside, outside),
    }
