"""The max over tokens of a block of products, in registers: along rows, or from one slab of columns to the next."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def of_columns(ref, cut):
    """[rows, columns] of one value a column."""
    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(x, (cut.rows, cut.columns), (1,))


def nothing(cut, winners):
    """What `fold` starts from: for each question (the max so far, [its token]); all questions at once if by_token."""
    shape, layout = (cut.rows,), plgpu.Layout.WGMMA.reduce(1)
    if cut.by_token:
        shape, layout = (cut.rows, cut.questions), plgpu.Layout.WGMMA
    start = (plgpu.layout_cast(jnp.full(shape, -jnp.inf, jnp.float32), layout),)
    if winners:
        start += (plgpu.layout_cast(jnp.zeros(shape, jnp.int32), layout),)
    return [start] * (1 if cut.by_token else cut.questions)


def fold(best, acc, first, cut):
    """`best` with the columns of one block, whose first token is `first`."""
    if cut.by_token:
        for n in range(cut.tokens):
            slab = acc[:, n * cut.questions : (n + 1) * cut.questions]
            best = [_better(best[0], slab, first + n)]
        return best
    folded = []
    for q, so_far in enumerate(best):
        part = acc[:, q * cut.tokens : (q + 1) * cut.tokens]
        top, won = jnp.max(part, axis=1), None
        if len(so_far) == 2:
            token = plgpu.broadcasted_iota(jnp.int32, part.shape, 1, layout=plgpu.Layout.WGMMA)
            here = part == lax.broadcast_in_dim(top, part.shape, (0,))
            won = jnp.min(jnp.where(here, token, cut.tokens), axis=1) + first
        folded.append(_better(so_far, top, won))
    return folded


def _better(so_far, score, token):
    top = jnp.maximum(so_far[0], score)
    return (top,) if len(so_far) == 1 else (top, jnp.where(score > so_far[0], token, so_far[1]))
