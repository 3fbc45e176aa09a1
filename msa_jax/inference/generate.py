"""Greedy generation of a batch: one prefill that routes, then decoding with a cache and the same documents.

Sizes: B questions, T prompt tokens, S cache slots, U new tokens, L_r router layers, N documents, k selected.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct

from msa_jax import tiers
from msa_jax.data.batch import ROUTING
from msa_jax.memory import MemoryBank
from msa_jax.model import KeyValues, MSATransformer
from msa_jax.routing import Selection


@struct.dataclass
class Context:
    """Right-padded prompts: `tokens` [B, T] int32, `roles` [B, T] int32, `mask` [B, T] bool."""

    tokens: jax.Array
    roles: jax.Array
    mask: jax.Array


@struct.dataclass
class Generation:
    """What a batch wrote.

    Attributes:
      tokens: [B, U] int32, padded with -1 after the stop token, which is kept.
      document_scores: [L_r, B, N] float32; None without a bank.
      selection: documents read, [L_r, B, k] fields; None without a bank.
    """

    tokens: jax.Array
    document_scores: jax.Array | None
    selection: Selection | None


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "stop_tokens"))
def generate(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    prefix: jax.Array,
    context: Context,
    bank: MemoryBank | None,
    *,
    visible: jax.Array | None = None,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
) -> Generation:
    """Greedy continuation of every prompt.

    Args:
      graphdef, params: `nnx.split(model)`.
      prefix: [S_p] int32, the template prefix, positions 0 to S_p - 1.
      context: prompts; tokens of role 0 route.
      bank: documents to read, None for none.
      visible: [B, N] bool, documents that a question may see; default all.
      max_new_tokens: U.
      stop_tokens: any of them ends a question's text.
    """
    model: MSATransformer = nnx.merge(graphdef, params)
    b, t = context.tokens.shape
    p = prefix.shape[0]
    past = model.encode_template(prefix[None]) if p else None
    own_mask = jnp.concatenate([jnp.ones((b, p), bool), context.mask], axis=1)
    lengths = jnp.sum(context.mask, axis=1)
    offset = model.config.position_offset
    output = model(
        context.tokens,
        positions=offset + jnp.maximum(jnp.cumsum(context.mask, axis=1) - 1, 0),
        mask=own_mask,
        past=past,
        bank=bank,
        route=(context.roles == ROUTING) & context.mask,
        visible=visible,
    )
    last = jnp.take_along_axis(output.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x, room), output.own)
    cache_mask = jnp.pad(own_mask, ((0, 0), (0, max_new_tokens)))
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def choose(hidden, done):
        token = jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)
        return jnp.where(done, -1, token), done | jnp.isin(token, stops)

    def more(carry):
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def decode(carry):
        step, written, done, cache, cache_mask = carry
        token = jax.lax.dynamic_index_in_dim(written, step - 1, axis=1, keepdims=True)
        slot = p + t + step - 1
        cache_mask = jax.lax.dynamic_update_slice_in_dim(cache_mask, jnp.ones((b, 1), bool), slot, axis=1)
        output = model(
            jnp.maximum(token, 0),
            positions=(offset + lengths + step - 1)[:, None],
            mask=cache_mask,
            past=cache,
            slot=slot,
            bank=near,
            selection=selected,
        )
        token, done = choose(output.hidden[:, 0], done)
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], step, axis=1)
        return step + 1, written, done, KeyValues(k=output.own.k, v=output.own.v), cache_mask

    # Content that is not on the device is fetched once, not for every token; a spread bank is read where it lies.
    near, selected = bank, output.selection
    if bank is not None and bank.layout.axes is None:
        near, selected = tiers.fetch(bank, selected)
    written = jnp.full((b, max_new_tokens), -1, jnp.int32)
    token, done = choose(last, jnp.zeros((b,), bool))
    written = written.at[:, 0].set(token)
    _, written, *_ = jax.lax.while_loop(more, decode, (jnp.int32(1), written, done, cache, cache_mask))
    return Generation(tokens=written, document_scores=output.document_scores, selection=output.selection)
