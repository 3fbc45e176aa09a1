"""Gradients of `chunk_scores` on Hopper: one matrix product each, whose left operand is made in registers.

That operand is the scores' gradient where a token won a chunk and zero elsewhere. It exists for one tile at a
time, so nothing of size B x T x C is stored. Sums run in a fixed order: two runs give the same bits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chunk_scores import gpu_config, gpu_terms, reference

# Rows and depth of a product, one warpgroup's, and its width along M.
_ROWS = 64
_WIDTH = 128
_ALONG_ROWS, _ALONG_COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@functools.partial(jax.jit, static_argnames="wanted")
def backward(query, keys, winners, grad, *, wanted):
    """Gradients of query and keys, None for one not wanted. See `reference.backward`."""
    if 0 in query.shape or 0 in keys.shape:
        return reference.backward(query, keys, winners, grad, wanted=wanted)
    # Chunks beyond the last add nothing: their keys are read as zeros, and their gradient is not written.
    short = -keys.shape[0] % _ROWS
    winners, grad = (jnp.pad(x, ((0, 0), (0, short))) for x in (winners, grad))
    return (
        _grad_query(query, keys, winners, grad) if wanted[0] else None,
        _grad_keys(query, keys, winners, grad) if wanted[1] else None,
    )


def _grad_query(query, keys, winners, grad):
    b, t, m = query.shape
    tokens, columns, tiles = pl.cdiv(t, _ROWS), pl.cdiv(m, _WIDTH), winners.shape[1] // _ROWS
    # As many parts of the bank as keep the device busy; their sums are added in order.
    parts = min(tiles, pl.cdiv(4 * gpu_config.multiprocessors(), b * tokens * columns))
    strip = gpu_config.strip_width(m, query.dtype, keys.dtype)
    sub, terms = min(strip, 64), 3 if keys.dtype == jnp.float32 else 1
    sums = plgpu.kernel(
        functools.partial(_query_kernel, tiles=tiles, parts=parts),
        out_type=jax.ShapeDtypeStruct((parts, b, tokens * _ROWS, columns * _WIDTH), jnp.float32),
        grid=(parts, b * tokens, columns),
        grid_names=("part", "row", "column"),
        scratch_types=dict(
            strips=_strips(strip, keys.dtype),
            right=plgpu.SMEM(
                (terms, _ROWS, _WIDTH),
                jnp.bfloat16,
                transforms=gpu_terms.swizzled(8, sub, jnp.bfloat16),
            ),
            out_smem=plgpu.SMEM((_ROWS, _WIDTH), jnp.float32),
            here=plgpu.Barrier(num_arrivals=_WIDTH // strip),
            operand=gpu_terms.operand((_ROWS, _ROWS), jnp.bfloat16),
        ),
    )(keys, winners, grad)
    return jnp.sum(sums, axis=0)[:, :t, :m].astype(query.dtype)


def _query_kernel(keys, winners, grad, out, *, tiles, parts, strips, right, out_smem, here, operand):
    part, column = lax.axis_index("part"), lax.axis_index("column")
    tokens = out.shape[2] // _ROWS
    question, first = lax.div(lax.axis_index("row"), tokens), lax.rem(lax.axis_index("row"), tokens) * _ROWS
    strip = strips.shape[2]

    def accumulate(acc):
        @pl.loop(lax.div(part * tiles, parts), lax.div((part + 1) * tiles, parts))
        def _(tile):
            chunks = pl.ds(tile * _ROWS, _ROWS)
            for s in range(strips.shape[0]):
                source = keys.at[chunks, pl.ds(column * _WIDTH + s * strip, strip)]
                plgpu.copy_gmem_to_smem(source, strips.at[s], here)
            left = gpu_terms.terms_of(_routed(winners.at[question, chunks], grad.at[question, chunks], first, 0))
            plgpu.barrier_wait(here)
            for s in range(strips.shape[0]):
                for n, term in enumerate(gpu_terms.terms_of(plgpu.load(strips.at[s]))):
                    right[n, :, s * strip : (s + 1) * strip] = term
            plgpu.commit_smem()
            gpu_terms.multiply_add(acc, left, [right.at[n] for n in range(right.shape[0])], operand)

        return acc[...]

    out_smem[...] = pl.run_scoped(accumulate, plgpu.ACC((_ROWS, _WIDTH), jnp.float32))
    plgpu.commit_smem()
    target = out.at[part, question, pl.ds(first, _ROWS), pl.ds(column * _WIDTH, _WIDTH)]
    plgpu.copy_smem_to_gmem(out_smem, target)
    plgpu.wait_smem_to_gmem(0)


def _grad_keys(query, keys, winners, grad):
    _, t, m = query.shape
    query = jnp.pad(query, ((0, 0), (0, -t % _ROWS), (0, -m % _WIDTH)))
    query = jnp.stack(gpu_terms.terms_of(query if query.dtype == jnp.bfloat16 else query.astype(jnp.float32)))
    return plgpu.kernel(
        _keys_kernel,
        out_type=jax.ShapeDtypeStruct(keys.shape, keys.dtype),
        grid=(winners.shape[1] // _ROWS, pl.cdiv(m, _WIDTH)),
        grid_names=("tile", "column"),
        scratch_types=dict(
            right=plgpu.SMEM(
                (query.shape[0], _ROWS, _WIDTH),
                jnp.bfloat16,
                transforms=gpu_terms.swizzled(8, 64, jnp.bfloat16),
            ),
            strips=_strips(gpu_config.strip_width(m, query.dtype, keys.dtype), keys.dtype),
            here=plgpu.Barrier(num_arrivals=query.shape[0]),
            operand=gpu_terms.operand((_ROWS, _ROWS), jnp.bfloat16),
        ),
    )(query, winners, grad)


def _keys_kernel(query, winners, grad, out, *, right, strips, here, operand):
    chunks, column = pl.ds(lax.axis_index("tile") * _ROWS, _ROWS), lax.axis_index("column") * _WIDTH
    tokens = query.shape[2] // _ROWS

    def accumulate(acc):
        @pl.loop(0, query.shape[1] * tokens)
        def _(i):
            question, first = lax.div(i, tokens), lax.rem(i, tokens) * _ROWS
            for n in range(query.shape[0]):
                plgpu.copy_gmem_to_smem(
                    query.at[n, question, pl.ds(first, _ROWS), pl.ds(column, _WIDTH)], right.at[n], here
                )
            left = gpu_terms.terms_of(_routed(winners.at[question, chunks], grad.at[question, chunks], first, 1))
            plgpu.barrier_wait(here)
            gpu_terms.multiply_add(acc, left, [right.at[n] for n in range(right.shape[0])], operand)

        return acc[...]

    total = pl.run_scoped(accumulate, plgpu.ACC((_ROWS, _WIDTH), jnp.float32))
    strip = strips.shape[2]
    for s in range(strips.shape[0]):
        strips[s] = total[:, s * strip : (s + 1) * strip].astype(out.dtype)
    plgpu.commit_smem()
    for s in range(strips.shape[0]):
        plgpu.copy_smem_to_gmem(strips.at[s], out.at[chunks, pl.ds(column + s * strip, strip)])
    plgpu.wait_smem_to_gmem(0)


def _strips(strip, dtype):
    """[strips, 64, strip]: a tile of keys or of their gradient. One row a tile of the layout, so C may be any."""
    return plgpu.SMEM((_WIDTH // strip, _ROWS, strip), dtype, transforms=gpu_terms.swizzled(1, strip, dtype))


def _routed(winners, grad, first, token_axis):
    """[64, 64] float32: the gradient of each chunk at its winning token, tokens counted from `first`."""
    layout = _ALONG_ROWS if token_axis else _ALONG_COLUMNS
    won, part = (plgpu.load(x, layout=layout, optimized=False) for x in (winners, grad))
    spread = lambda x: lax.broadcast_in_dim(x, (_ROWS, _ROWS), (1 - token_axis,))  # noqa: E731
    token = plgpu.broadcasted_iota(jnp.int32, (_ROWS, _ROWS), token_axis, layout=plgpu.Layout.WGMMA)
    return jnp.where(spread(won) == token + first, spread(part), 0.0)
