"""What the model's verbs are given: what stands before the tokens to come, and how these read the memory.

Sizes: B questions, T tokens to come, S tokens that there is room for, L layers, L_r router layers, K key/value heads,
D head dim, N documents, k documents selected.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from msa_jax.memory import MemoryBank, Selection


@struct.dataclass
class KeyValues:
    """Keys and values of tokens in every layer, [L, B, S, K, D] each."""

    k: jax.Array
    v: jax.Array

    def put(self, new: KeyValues, *, begin: jax.Array, lengths: jax.Array, rows: jax.Array) -> KeyValues:
        """With the first `lengths` [b] of new tokens [L, b, T, K, D] in `rows` [b], from `begin` [b] on.

        What lies beyond the last row or S is dropped.
        """
        size, t = self.k.shape[2], new.k.shape[2]
        columns = jnp.where(jnp.arange(t)[None] < lengths[:, None], begin[:, None] + jnp.arange(t)[None], size)
        return jax.tree.map(lambda x, y: x.at[:, rows[:, None], columns].set(y, mode="drop"), self, new)


@struct.dataclass
class Context:
    """Tokens that are computed, and where the ones to come stand: a template prefix, or what a cache holds.

    Attributes:
      past: keys and values, [L, B, S, K, D]; B may be 1 for what all questions share.
      length: [B] int32, how many of S stand, from the first on. What lies behind them is of no meaning.
      position: [B] int32, of the token that comes next.
    """

    past: KeyValues
    length: jax.Array
    position: jax.Array

    @property
    def size(self) -> int:
        """S."""
        return self.past.k.shape[2]

    def add(self, own: KeyValues, lengths: jax.Array | None = None) -> Context:
        """The context with tokens behind it that `prefill` or `extend` gave, while there is room for them.

        Args:
          own: `ModelOutput.own`, [L, B, T, K, D].
          lengths: [B] int32, how many of them there are; default all.
        """
        b, t = own.k.shape[1:3]
        lengths = jnp.full(b, t, jnp.int32) if lengths is None else lengths
        past = self.past.put(own, begin=self.length, lengths=lengths, rows=jnp.arange(b))
        return Context(past=past, length=self.length + lengths, position=self.position + lengths)


# What routing gives beside a selection: `document_scores` and `queries` of `ModelOutput`. Scores of all documents are
# what some retrievers know; those that do not refuse with a ConfigError.
Extra = Literal["scores", "queries"]


@struct.dataclass
class Route:
    """Select documents by the tokens to come, which begin a context, and read those.

    Attributes:
      bank: the memory.
      tokens: [B, T] bool, those that route; default all that exist.
      visible: [B, N] bool, documents that a question may see; default all.
      mean_over_tokens: bool, or [] bool: score by the mean over routing tokens, not the max (warm-up of training).
      max_routing: U, the most tokens of a question that route: only so many are scored, the first U. Default T.
      bank_gradients: say that the bank is differentiated. Results are the same: layers then take copies of their parts
        of the bank, which keeps gradients small, and else read it where it lies.
      want: what else routing is to give.
    """

    bank: MemoryBank
    tokens: jax.Array | None = None
    visible: jax.Array | None = None
    mean_over_tokens: jax.Array | bool | None = None
    max_routing: int | None = struct.field(pytree_node=False, default=None)
    bank_gradients: bool = struct.field(pytree_node=False, default=False)
    want: tuple[Extra, ...] = struct.field(pytree_node=False, default=())


@struct.dataclass
class Reuse:
    """Read what was selected before; nothing routes. `selection`: [L_r, B, k] fields."""

    bank: MemoryBank
    selection: Selection


@struct.dataclass
class Resume:
    """Select anew, by the tokens to come and by what earlier ones selected, as long as these read the same.

    Where a layer now selects other documents for every question, the tokens before are no longer what they were, and
    the layers behind it are left out: `ModelOutput.same` tells.

    Attributes:
      bank: the memory.
      selection: [L_r, B, k] fields, what the tokens before read.
      also: [L_r, B, k] fields, what those of them that still route select.
      tokens, visible, want: as in `Route`.
    """

    bank: MemoryBank
    selection: Selection
    also: Selection
    tokens: jax.Array | None = None
    visible: jax.Array | None = None
    want: tuple[Extra, ...] = struct.field(pytree_node=False, default=())


Read = Route | Reuse | Resume
