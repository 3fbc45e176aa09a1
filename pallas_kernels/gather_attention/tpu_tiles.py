"""TPU: what one block of chunks or own tokens is to the rows of a step: its keys, values and logits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gather_attention.tpu_stream import Shape, Stream


def product(a, b, dimensions):
    """Matrix product with float32 sums; operands in float32 are multiplied in full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (dimensions, ((), ())), precision=precision, preferred_element_type=jnp.float32)


class Block(NamedTuple):
    """What one block of chunks or own tokens is to the rows of a step, for one key/value head."""

    keys: jax.Array  # [columns, D] in q's dtype; 0 where no row may look
    values: jax.Array  # [columns, D], likewise
    logits: jax.Array  # [rows, columns] float32
    allowed: jax.Array  # [rows or 1, columns]
    key_scale: jax.Array | None  # [1, columns] float32
    value_scale: jax.Array | None


def bias_column(bias_ref, group_ref, shape: Shape, question, document, head):
    """[rows, 1] bias of a document for the query heads of key/value head `head`."""
    group = shape.blocks.group
    first = ((question * shape.selected + document) * shape.kv_heads + head) * group
    column = jnp.zeros(group_ref.shape, jnp.float32)
    for g in range(group):
        column = jnp.where(group_ref[...] == g, bias_ref[first + g], column)
    return column


class Rows(NamedTuple):
    """References that every kernel over query rows has."""

    q: jax.Array  # [1, K, rows, D]
    token: jax.Array  # [rows, 1] int32, token of a row within the block
    group: jax.Array  # [rows, 1] int32, query head of a row within its group
    mask: jax.Array | None  # [1, own blocks, own] int32
    bias: jax.Array | None  # [B * k * H] float32 in SMEM


def bank_block(stream: Stream, rows: Rows, head, question, j, o, slot) -> Block:
    shape, buffers = stream.shape, stream.buffers
    wanted, start = stream.chunk_start(question, j, o)
    at = question * shape.selected + j
    end = stream.tables.starts[at] + stream.tables.lengths[at]
    allowed = _between(wanted, end, start, (1, shape.blocks.chunks))
    allowed_rows = _between(wanted, end, start, (shape.blocks.chunks, 1))
    keys, values, logits = _dots(rows.q, buffers.bank_k, buffers.bank_v, allowed_rows, shape, head, slot)
    key_scale = value_scale = None
    if shape.int8:
        # The window begins at a multiple of 128: turn it until the chunk that was read first is first.
        _, before = stream.scale_start(start)
        shift = (shape.scale_window - before) % shape.scale_window
        turn = lambda ref: pltpu.roll(ref[slot], shift, 1)[head : head + 1, : shape.blocks.chunks]  # noqa: E731
        key_scale = jnp.where(allowed, turn(buffers.scale_k), 0.0)
        value_scale = jnp.where(allowed, turn(buffers.scale_v), 0.0)
        logits = logits * key_scale
    if shape.bias:
        logits = logits + bias_column(rows.bias, rows.group, shape, question, stream.tables.documents[at], head)
    return Block(keys, values, logits, allowed, key_scale, value_scale)


def own_block(stream: Stream, rows: Rows, head, step, o, slot) -> Block:
    shape, own = stream.shape, stream.shape.blocks.own
    token = (step % shape.steps_per_question) * shape.blocks.tokens + rows.token[...]
    position = o * own + jax.lax.broadcasted_iota(jnp.int32, (1, own), 1)
    exists = rows.mask[0, pl.ds(o, 1), :] > 0
    allowed = jnp.logical_and(position <= token + (shape.own - shape.tokens), exists)
    within = _between(0, shape.own, o * own, (own, 1))
    keys, values, logits = _dots(rows.q, stream.buffers.own_k, stream.buffers.own_v, within, shape, head, slot)
    return Block(keys, values, logits, allowed, None, None)


def _between(first, end, start, shape):
    index = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if shape[1] == 1 else 1)
    return jnp.logical_and(index >= first, index < end)


def _dots(q_ref, keys_ref, values_ref, allowed_rows, shape, head, slot):
    dtype = q_ref.dtype
    # Behind the end lies another document, or nothing: 0 * NaN is NaN.
    keys = jnp.where(allowed_rows, keys_ref[slot, :, head, :].astype(dtype), 0)
    values = jnp.where(allowed_rows, values_ref[slot, :, head, :].astype(dtype), 0)
    return keys, values, product(q_ref[0, head], keys, ((1,), (1,))) * shape.head_dim**-0.5
