"""What a router layer selected, as arrays: which documents, their scores, and where their chunks are.

Sizes: B questions, k documents selected.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.chunk_scores.api import NO_SCORE


@struct.dataclass
class Selection:
    """Documents that a router layer reads for each question, best first.

    Attributes:
      documents: [B, k] int32 document indices.
      scores: [B, k] float32, `NO_SCORE` where fewer than k documents were visible.
      starts, lengths: [B, k] int32, chunk ranges; length 0 where nothing was selected.
    """

    documents: jax.Array
    scores: jax.Array
    starts: jax.Array
    lengths: jax.Array


def merge(first: Selection, second: Selection) -> Selection:
    """What is selected by the larger of two scores of every document, given what each of them selects.

    Exact: a document among the k best by the larger score is among the k best by the score that is larger. Of equal
    scores the lower document comes first, as in `select`. All fields are [B, k].
    """
    both = (first.documents[:, :, None] == second.documents[:, None, :]) & (
        (first.lengths[:, :, None] > 0) & (second.lengths[:, None, :] > 0)
    )
    larger = jnp.max(jnp.where(both, second.scores[:, None, :], NO_SCORE), axis=2, initial=NO_SCORE)
    scores = jnp.concatenate(
        [jnp.maximum(first.scores, larger), jnp.where(jnp.any(both, axis=1), NO_SCORE, second.scores)], axis=1
    )
    join = lambda name: jnp.concatenate([getattr(first, name), getattr(second, name)], axis=1)  # noqa: E731
    lengths = jnp.where(scores > NO_SCORE / 2, join("lengths"), 0)
    order, documents, starts, lengths = jax.lax.sort((-scores, join("documents"), join("starts"), lengths), num_keys=2)
    k = first.documents.shape[1]
    return Selection(documents=documents[:, :k], scores=-order[:, :k], starts=starts[:, :k], lengths=lengths[:, :k])


def reads_alike(selection: Selection, before: Selection, *, biased: bool) -> jax.Array:
    """[B] bool: attention gives the same under both: the same documents, and with a router bias the same scores."""

    def in_order(s):
        there = s.lengths > 0
        order = jnp.argsort(jnp.where(there, s.documents, jnp.iinfo(jnp.int32).max), axis=1)
        values = (jnp.where(there, s.documents, -1), jnp.where(there, s.scores, 0.0))
        return tuple(jnp.take_along_axis(x, order, axis=1) for x in values)

    (documents, scores), (others, their_scores) = in_order(selection), in_order(before)
    same = documents == others
    return jnp.all(same & (scores == their_scores) if biased else same, axis=1)


def bias_of(selection: Selection, beta: jax.Array) -> jax.Array:
    """Router bias [B, k, H]: `beta_h * (s_d - max s)`, 0 where nothing was selected."""
    found = selection.lengths > 0
    scores = jnp.where(found, selection.scores, 0.0)
    best = jnp.max(jnp.where(found, selection.scores, NO_SCORE), axis=1, keepdims=True, initial=NO_SCORE)
    gap = jnp.where(found, scores - best, 0.0)
    return gap[:, :, None] * beta.astype(jnp.float32)[None, None, :]
