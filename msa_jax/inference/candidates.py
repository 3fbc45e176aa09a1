"""Constrained decoding: numbers that the model writes are held to those of documents that it was routed to.

What a router selects is all that the model attends to, so any other number is made up. As a constrained beam search
over the names of things does (GENRE, arXiv 2010.00904), with a beam of one and the documents of one question: of the
tokens that may come next within a number, only those go on that some candidate has there.

Sizes: b questions, C candidates, D tokens of the longest number without the one that opens it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Candidates:
    """Numbers that may be written, and how far the one that is being written has come; numpy or JAX arrays.

    Attributes:
      tokens: [b, C, D] int32, a number behind the token that opens it, padded with -1; all -1 for none.
      opening: [] int32, that token.
      held: [b] bool, questions whose numbers are held to the candidates.
      free: [b, C] bool, candidates that were not written yet.
      fits: [b, C] bool, those whose tokens are the ones written since a number was opened; outside of one, `free`.
      depth: [b] int32, tokens written since a number was opened, -1 outside of one.
    """

    tokens: jax.Array | np.ndarray
    opening: jax.Array | np.ndarray
    held: jax.Array | np.ndarray
    free: jax.Array | np.ndarray
    fits: jax.Array | np.ndarray
    depth: jax.Array | np.ndarray

    def _here(self, ahead: int = 0):
        """[b, C] int32, the token of each candidate that comes next, or `ahead` of it; -1 behind its end."""
        xp = self.tokens.__array_namespace__()
        at = xp.arange(self.tokens.shape[2])[None, None] == xp.maximum(self.depth, 0)[:, None, None] + ahead
        return xp.max(xp.where(at, self.tokens, -1), axis=2, initial=-1)

    def restrict(self, logits: jax.Array) -> jax.Array:
        """Logits [b, V] float32 with -inf for what may not come next; to be called within jit.

        Within a number that no candidate fits, such as one that was opened when all were written, all may come.
        """
        here = jnp.where(self.fits, self._here(), -1)
        rows = jnp.arange(logits.shape[0])[:, None]
        columns = jnp.where(here >= 0, here, logits.shape[1])
        fitting = jnp.zeros(logits.shape, bool).at[rows, columns].set(True, mode="drop")
        inside = self.held & (self.depth >= 0) & jnp.any(here >= 0, axis=1)
        spent = self.held & (self.depth < 0) & ~jnp.any(self.free, axis=1)
        opens = jnp.arange(logits.shape[1])[None] == self.opening
        return jnp.where((inside[:, None] & ~fitting) | (spent[:, None] & opens), -jnp.inf, logits)

    def wrote(self, token: jax.Array | np.ndarray) -> Candidates:
        """After the next token, [b] int32, of every question; of numpy arrays or within jit."""
        xp = self.tokens.__array_namespace__()
        inside = self.depth >= 0
        fits = self.fits & inside[:, None] & (self._here() == token[:, None])
        whole = fits & (self._here(1) < 0)
        goes_on = xp.any(fits, axis=1) & ~xp.any(whole, axis=1)
        free = self.free & ~whole
        depth = xp.where(goes_on, self.depth + 1, xp.where(~inside & (token == self.opening), 0, -1))
        return self.replace(free=free, fits=xp.where(goes_on[:, None], fits, free), depth=depth.astype(xp.int32))


def candidates_of(
    numbers: Sequence[Sequence[Sequence[int]] | None], written: Sequence[Sequence[int]],
    *, opening: int, shape: tuple[int, int],
) -> Candidates:  # fmt: skip
    """The candidates of b questions, as numpy arrays.

    Args:
      numbers: of each, the tokens of every number that may be written; None for a question that is not held.
      written: of each, what it has written in this turn.
      opening: the token that all numbers begin with.
      shape: C and D, at least what is needed.
    """
    b = len(numbers)
    tokens = np.full((b, *shape), -1, np.int32)
    for row, some in enumerate(numbers):
        for place, number in enumerate(some or ()):
            tokens[row, place, : len(number) - 1] = number[1:]
    free = tokens[:, :, 0] >= 0
    state = Candidates(
        tokens=tokens, opening=np.int32(opening), held=np.array([some is not None for some in numbers]),
        free=free, fits=free, depth=np.full(b, -1, np.int32),
    )  # fmt: skip
    longest = max(map(len, written), default=0)
    # Padded in front: what is no token leaves a question as it is while no number is open.
    padded = np.array([[-2] * (longest - len(turn)) + list(turn) for turn in written], np.int32).reshape(b, longest)
    for column in range(longest):
        state = state.wrote(padded[:, column])
    return state
