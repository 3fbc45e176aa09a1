"""TPU form of `chunk_scores`: keys stream through VMEM once, past the routing tokens that stay there.

Sizes: B questions, T routing tokens, C chunks, M router width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.chunk_scores import config
from pallas_kernels.chunk_scores.reference import NO_SCORE

_FLOATS = (jnp.float32, jnp.bfloat16)


def unsupported(*, query, keys) -> str | None:
    """Why a case cannot run, or None. See `reference.unsupported`."""
    if query.dtype not in (*_FLOATS, jnp.int8) or keys.dtype not in (*_FLOATS, jnp.int8):
        return f"queries and keys must be float32, bfloat16 or int8, got {query.dtype} and {keys.dtype}."
    if 0 in query.shape or 0 in keys.shape:
        return f"there is nothing to score: query {query.shape}, keys {keys.shape}."
    if blocks_of(query, keys) is None:
        return f"no block of query {query.shape} and keys {keys.shape} fits in VMEM."
    return None


def blocks_of(query, keys):
    b, t, m = query.shape
    sizes = query.dtype.itemsize, keys.dtype.itemsize
    return config.choose(b, t, keys.shape[-2], m, *sizes, tpu_chip.vmem_budget())


def _product(a, b, dimensions):
    """Matrix product on the matrix unit, float32: of float32 in full precision, of integers exactly."""
    # Named, so that a program's default precision does not reach types that know only one.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    sums = jnp.int32 if jnp.issubdtype(a.dtype, jnp.integer) else jnp.float32
    product = jax.lax.dot_general(a, b, (dimensions, ((), ())), precision=precision, preferred_element_type=sums)
    return product.astype(jnp.float32)


def _common(query, keys):
    """Both in the type of their product."""
    if query.dtype == jnp.int8:
        return query, keys
    dtype = query.dtype if keys.dtype == jnp.int8 else jnp.promote_types(query.dtype, keys.dtype)
    return query.astype(dtype), keys.astype(dtype)


def to_rows(blocks: config.Blocks, x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [blocks, rows, ...], padded with zeros, rows in the order of `blocks`."""
    b, t = x.shape[:2]
    count = -(-b // blocks.questions)
    rest = ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, ((0, count * blocks.questions - b), (0, blocks.tokens - t), *rest))
    x = x.reshape(count, blocks.questions, blocks.tokens, *x.shape[2:])
    if blocks.token_major:
        x = x.swapaxes(1, 2)
    return x.reshape(count, blocks.rows, *x.shape[3:])


def by_question(blocks: config.Blocks, x: jax.Array) -> tuple[jax.Array, int]:
    """Rows [rows, tile] split into tokens and questions, and the axis of the tokens."""
    if blocks.token_major:
        return x.reshape(blocks.tokens, blocks.questions, x.shape[-1]), 0
    return x.reshape(blocks.questions, blocks.tokens, x.shape[-1]), 1


def _forward_kernel(blocks, scaled, layer_ref, query_ref, rows_ref, keys_ref, *refs):
    del layer_ref  # it chose the keys
    key_scale_ref, *refs = refs if scaled[1] else (None, *refs)
    scores_ref, winners_ref = (*refs, None)[:2]
    query, keys = _common(query_ref[0], keys_ref[0])
    products = _product(query, keys, ((1,), (1,)))
    if scaled[0]:
        products = products * rows_ref[0][:, 1:2]
    products, axis = by_question(blocks, jnp.where(rows_ref[0][:, :1] > 0, products, NO_SCORE))
    best = jnp.max(products, axis=axis, keepdims=True)
    scores = jnp.squeeze(best, axis)
    if scaled[1]:
        # A scale is positive, so it commutes with the max.
        scores = jnp.where(scores > NO_SCORE / 2, scores * key_scale_ref[...], NO_SCORE)
    scores_ref[0] = scores
    if winners_ref is not None:
        # The first of equals. Small integers are exact in float32, whose reductions the chip has.
        token = jax.lax.broadcasted_iota(jnp.int32, products.shape, axis).astype(jnp.float32)
        first = jnp.min(jnp.where(products == best, token, blocks.tokens - 1.0), axis=axis)
        winners_ref[0] = first.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="winners")
def forward(query, keys, query_mask, query_scale, key_scale, layer=None, *, winners):
    """Scores [B, C] float32 and winners [B, C] int32 or None. See `reference.forward`."""
    b, t, m = query.shape
    num_chunks = keys.shape[-2]
    blocks = blocks_of(query, keys)
    scaled = query_scale is not None, key_scale is not None
    # Column 0: does the token route; column 1: its scale.
    columns = [query_mask.astype(jnp.float32)] + ([query_scale] if scaled[0] else [])
    rows = to_rows(blocks, jnp.stack(columns, axis=-1))
    query = to_rows(blocks, query)
    tile = blocks.tile
    out_shape = (query.shape[0], blocks.questions, num_chunks)
    out_spec = pl.BlockSpec((1, blocks.questions, tile), lambda i, j, layer: (j, 0, i))
    if layer is None:
        keys, layer = keys[None], jnp.zeros((), jnp.int32)
    elif scaled[1]:
        key_scale = key_scale[layer]
    scales = [key_scale[None, :]] if scaled[1] else []
    outs = pl.pallas_call(
        functools.partial(_forward_kernel, blocks, scaled),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(num_chunks, tile), query.shape[0]),  # keys outside: each tile is read once
            in_specs=[
                pl.BlockSpec((1, blocks.rows, m), lambda i, j, layer: (j, 0, 0)),
                pl.BlockSpec((1, blocks.rows, len(columns)), lambda i, j, layer: (j, 0, 0)),
                pl.BlockSpec((1, tile, m), lambda i, j, layer: (layer[0], i, 0)),
                *[pl.BlockSpec((1, tile), lambda i, j, layer: (0, i))] * len(scales),
            ],
            out_specs=[out_spec] * (1 + winners),
        ),
        out_shape=[jax.ShapeDtypeStruct(out_shape, jnp.float32), jax.ShapeDtypeStruct(out_shape, jnp.int32)][
            : 1 + winners
        ],
        compiler_params=_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * t * num_chunks * m,
            bytes_accessed=num_chunks * m * keys.dtype.itemsize + 4 * b * num_chunks * (1 + winners),
            transcendentals=0,
        ),
        name="chunk_scores_forward",
    )(layer[None], query, rows, keys, *scales)
    scores, *won = (out.reshape(-1, num_chunks)[:b] for out in outs)
    return scores, won[0] if winners else None


def _params(*semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=tpu_chip.vmem_budget())


def _routed(blocks, winners_ref, grad_ref):
    """[rows, tile]: the gradient of a chunk in the row of the token that won it, else 0."""
    axis = 0 if blocks.token_major else 1
    shape = list(winners_ref.shape[1:])
    shape.insert(axis, blocks.tokens)
    token = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    won = jnp.expand_dims(winners_ref[0], axis) == token
    return jnp.where(won, jnp.expand_dims(grad_ref[0], axis), 0.0).reshape(blocks.rows, -1)


def _query_kernel(blocks, num_chunks, keys_ref, winners_ref, grad_ref, out_ref):
    @pl.when(pl.program_id(1) == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    chunk = pl.program_id(1) * blocks.tile + jax.lax.broadcasted_iota(jnp.int32, (1, blocks.tile), 1)
    inside = chunk < num_chunks
    routed = jnp.where(inside, _routed(blocks, winners_ref, grad_ref), 0.0)
    # What lies behind the last chunk may be anything, and 0 * NaN is NaN.
    row = pl.program_id(1) * blocks.tile + jax.lax.broadcasted_iota(jnp.int32, (blocks.tile, 1), 0)
    keys = keys_ref[...]
    keys = jnp.where(row < num_chunks, keys.astype(jnp.float32), 0.0)
    dtype = jnp.float32 if keys_ref.dtype == jnp.float32 else jnp.bfloat16
    out_ref[0] += _product(routed.astype(dtype), keys.astype(dtype), ((1,), (0,)))


def _keys_kernel(blocks, query_ref, winners_ref, grad_ref, out_ref, sum_ref):
    @pl.when(pl.program_id(1) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    query = query_ref[0]
    routed = _routed(blocks, winners_ref, grad_ref).astype(query.dtype)
    sum_ref[...] += _product(routed, query, ((0,), (0,)))

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnames="wanted")
def backward(query, keys, winners, grad, *, wanted):
    """Gradients of query and keys. See `reference.backward`."""
    b, t, m = query.shape
    num_chunks = keys.shape[0]
    blocks = blocks_of(query, keys)
    tile = blocks.tile
    rows = to_rows(blocks, query)
    count, tiles = rows.shape[0], pl.cdiv(num_chunks, tile)
    pad = ((0, count * blocks.questions - b), (0, 0))
    winners, grad = (jnp.pad(x, pad).reshape(count, blocks.questions, num_chunks) for x in (winners, grad))
    grad_query = grad_keys = None
    if wanted[0]:
        per_chunk = pl.BlockSpec((1, blocks.questions, tile), lambda j, i: (j, 0, i))
        grad_rows = pl.pallas_call(
            functools.partial(_query_kernel, blocks, num_chunks),
            grid=(count, tiles),
            in_specs=[pl.BlockSpec((tile, m), lambda j, i: (i, 0)), per_chunk, per_chunk],
            out_specs=pl.BlockSpec((1, blocks.rows, m), lambda j, i: (j, 0, 0)),
            out_shape=jax.ShapeDtypeStruct((count, blocks.rows, m), jnp.float32),
            compiler_params=_params("parallel", "arbitrary"),
            name="chunk_scores_grad_query",
        )(keys, winners, grad)
        grad_query = _from_rows(blocks, grad_rows, b, t).astype(query.dtype)
    if wanted[1]:
        per_chunk = pl.BlockSpec((1, blocks.questions, tile), lambda i, j: (j, 0, i))
        grad_keys = pl.pallas_call(
            functools.partial(_keys_kernel, blocks),
            grid=(tiles, count),
            in_specs=[pl.BlockSpec((1, blocks.rows, m), lambda i, j: (j, 0, 0)), per_chunk, per_chunk],
            out_specs=pl.BlockSpec((tile, m), lambda i, j: (i, 0)),
            out_shape=jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            scratch_shapes=[pltpu.VMEM((tile, m), jnp.float32)],
            compiler_params=_params("parallel", "arbitrary"),
            name="chunk_scores_grad_keys",
        )(rows, winners, grad)
    return grad_query, grad_keys


def _from_rows(blocks, rows, b, t):
    """Inverse of `to_rows`: [blocks, rows, M] -> [B, T, M]."""
    split = (blocks.tokens, blocks.questions) if blocks.token_major else (blocks.questions, blocks.tokens)
    x = rows.reshape(rows.shape[0], *split, rows.shape[-1])
    if blocks.token_major:
        x = x.swapaxes(1, 2)
    return x.reshape(-1, blocks.tokens, rows.shape[-1])[:b, :t]
