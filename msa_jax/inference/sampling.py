"""Choosing the next token within a compiled step: greedy, temperature, top-k and nucleus; B questions, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from msa_jax.inference.settings import Sampling


@struct.dataclass
class SamplingState:
    """How each question's next token is chosen; see `Sampling`.

    Attributes:
      temperature: [B] float32; 0 takes the most likely token.
      top_p: [B] float32, in (0, 1].
      top_k: [B] int32; 0 means all.
      seed: [B] uint32.
      count: [B] int32, tokens that the question has written so far. What is drawn depends on the logits, the seed and
        this, not on the slot or on what else is in the batch.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    seed: jax.Array
    count: jax.Array


def from_settings(settings: Sequence[Sampling], counts: Sequence[int] | None = None) -> SamplingState:
    """The state of questions that have written `counts` tokens, default none; numpy arrays."""
    column = lambda name, dtype: np.asarray([getattr(s, name) for s in settings], dtype)  # noqa: E731
    return SamplingState(
        # Their reciprocals must be normal float32, too: XLA may multiply instead of divide.
        temperature=np.asarray([s.temperature and min(max(s.temperature, 1e-30), 1e30) for s in settings], np.float32),
        top_p=column("top_p", np.float32),
        top_k=np.asarray([min(s.top_k, np.iinfo(np.int32).max) for s in settings], np.int32),
        seed=column("seed", np.uint32),
        count=np.zeros(len(settings), np.int32) if counts is None else np.asarray(counts, np.int32),
    )


def _keep(scaled: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """[B, V] bool, tokens that may be drawn: the first `top_k`, and of those the nucleus; equals by lower id first."""
    ranked = -jnp.sort(-scaled, axis=1)
    rank = jnp.arange(scaled.shape[1])[None]
    allowed = jnp.where(rank < jnp.where(top_k > 0, top_k, rank.size)[:, None], ranked, -jnp.inf)
    probability = jax.nn.softmax(allowed, axis=1)
    before = jnp.cumsum(probability, axis=1) - probability  # of the more likely ones: the one that crosses is kept
    # Rounding lets the sum reach 1 before the last token does: top_p 1 must still leave them all.
    kept = ((before < top_p[:, None]) | (top_p >= 1)[:, None] | (rank == 0)) & (allowed > -jnp.inf)
    # Where the least likely of them stands tells which they are: cheaper than sorting ids along and scattering back.
    count = jnp.sum(kept, axis=1, keepdims=True)
    least = jnp.take_along_axis(ranked, count - 1, axis=1)
    equal = scaled == least
    more = count - jnp.sum(scaled > least, axis=1, keepdims=True)
    return (scaled > least) | (equal & (jnp.cumsum(equal, axis=1) <= more))


def _draw(logits: jax.Array, sampling: SamplingState, greedy: jax.Array) -> jax.Array:
    # The largest is 0 before the division, so that a tiny temperature sends the others to -inf and none to +inf.
    shifted = logits - jnp.max(logits, axis=1, keepdims=True)
    scaled = shifted / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    restricted = (sampling.temperature > 0) & ((sampling.top_p < 1) | (sampling.top_k > 0))
    # Sorting the vocabulary costs far more than the draw, and most questions restrict nothing.
    kept = jax.lax.cond(
        jnp.any(restricted),
        lambda: _keep(scaled, sampling.top_p, sampling.top_k),
        lambda: jnp.ones(scaled.shape, bool),
    )

    def noise(seed, count):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape[1:], jnp.float32)

    perturbed = jnp.where(kept, scaled, -jnp.inf) + jax.vmap(noise)(sampling.seed, sampling.count)
    return jnp.where(sampling.temperature > 0, jnp.argmax(perturbed, axis=1), greedy).astype(jnp.int32)


def choose(logits: jax.Array, sampling: SamplingState) -> jax.Array:
    """The next token of every question; to be called within jit.

    Logits are divided by the temperature, the `top_k` largest are kept, of those the fewest whose probability reaches
    `top_p` (at least one), and one of them is drawn. Equal logits rank by lower id. With temperature 0 it is the
    largest; the draws are skipped when that is so for every question, and the sorting when none restricts.

    Args:
      logits: [B, V] float32; -inf is never chosen. A row needs one that is finite.
      sampling: see `SamplingState`.

    Returns:
      [B] int32.
    """
    greedy = jnp.argmax(logits, axis=1).astype(jnp.int32)
    return jax.lax.cond(jnp.any(sampling.temperature > 0), lambda: _draw(logits, sampling, greedy), lambda: greedy)
