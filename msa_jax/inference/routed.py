"""What a routing found, in the numbers of documents."""

from __future__ import annotations

import dataclasses

import numpy as np

from msa_jax.inference.library import Library
from msa_jax.inference.programs import Written
from msa_jax.routing import NO_SCORE


@dataclasses.dataclass(frozen=True)
class Routed:
    """What a routing found, and what it took.

    Attributes:
      documents: [L_r, R] int64, numbers of the best documents of each router layer, -1 for none.
      scores: [L_r, R] float32, their scores.
      ranking: mean score over router layers by number, best first.
      selected: of those, the numbers that a router layer selected.
      tokens: how many were computed for it.
      why: why tokens were computed anew; empty if none were.
    """

    documents: np.ndarray
    scores: np.ndarray
    ranking: dict[int, float]
    selected: tuple[int, ...]
    tokens: int
    why: str


def routed_of(written: Written, place: int, library: Library, *, top_k: int, tokens: int, why: str) -> Routed:
    """What the routing of the question at `place` of a step found; a router layer selects `top_k` documents."""
    documents = np.asarray(written.documents[:, place])
    layers, reported = documents.shape
    scores = np.asarray(written.scores[:, place])  # [L_r, L_r * R]
    numbers = library.numbers(documents.reshape(-1))
    numbers[(scores <= NO_SCORE / 2).all(axis=0)] = -1
    mean = np.maximum(scores, -1.0).mean(axis=0)
    order = np.argsort(-mean, kind="stable")
    ranking = {int(numbers[i]): float(mean[i]) for i in order if numbers[i] >= 0}
    own = np.stack([scores[i, i * reported : (i + 1) * reported] for i in range(layers)])
    best = np.where(own > NO_SCORE / 2, numbers.reshape(layers, reported), -1)
    chosen = set(best[:, :top_k].flat)
    return Routed(
        documents=best,
        scores=own,
        ranking=ranking,
        selected=tuple(number for number in ranking if number in chosen),
        tokens=tokens,
        why=why,
    )


def no_routing(tokens: int) -> Routed:
    """Of a question without a bank."""
    return Routed(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32), {}, (), tokens, "")
