"""TPU: gradients of keys and values. Every tile of them has one owner, which sums what all questions send.

The owner visits the ranges that touch its tile in a fixed order and writes the tile once: nothing is scattered,
and two runs agree to the bit. Own tokens are a bank too: B ranges of S tokens, with a causal mask.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gather_attention.config import Blocks
from pallas_kernels.gather_attention.reference import MASKED
from pallas_kernels.gather_attention.tpu_backward import head_columns, shifted_lse
from pallas_kernels.gather_attention.tpu_call import params, to_rows
from pallas_kernels.gather_attention.tpu_tiles import product


class Ranges(NamedTuple):
    """Ranges in the order of their starts, flat int32 in SMEM, and the span of them that each tile may meet."""

    first: jax.Array  # [tiles]
    last: jax.Array  # [tiles], behind the last
    starts: jax.Array  # [ranges]
    ends: jax.Array  # [ranges]
    origins: jax.Array  # [ranges] which range it was, flat in [B, k]


def ranges(starts: jax.Array, lengths: jax.Array, tile: int, tiles: int) -> Ranges:
    """Ranges of `starts`, `lengths` [B, k] against tiles of `tile` rows."""
    starts, lengths = starts.reshape(-1), lengths.reshape(-1)
    # Empty ranges meet no tile: they go last.
    order = jnp.argsort(jnp.where(lengths > 0, starts, jnp.iinfo(jnp.int32).max), stable=True).astype(jnp.int32)
    filled = lengths[order] > 0
    starts = jnp.where(filled, starts[order], jnp.iinfo(jnp.int32).max)
    ends = jnp.where(filled, starts + lengths[order], 0)
    begin = jnp.arange(tiles, dtype=jnp.int32) * tile
    # All ranges before `first` have ended, for the latest end so far only grows.
    first = jnp.searchsorted(jax.lax.cummax(ends), begin, side="right")
    last = jnp.searchsorted(starts, begin + tile, side="left")
    return Ranges(first.astype(jnp.int32), jnp.maximum(first, last).astype(jnp.int32), starts, ends, order)


@dataclasses.dataclass(frozen=True)
class Owned:
    """The static sizes of a call: rows are chunks, or own tokens of all questions."""

    selected: int  # ranges of a question
    rows: int
    kv_heads: int
    head_dim: int
    steps_per_question: int
    causal: bool  # own tokens: the range of question b is its S tokens
    shift: int  # S - T
    bias: bool
    blocks: Blocks

    @property
    def tile(self) -> int:
        return min(self.blocks.tile, self.rows)


def _kernel(owned: Owned, *refs):
    spans, refs = Ranges(*refs[:5]), refs[5:]
    bias_ref = None
    if owned.bias:
        bias_ref, refs = refs[0], refs[1:]
    token_ref, group_ref, keys_ref, values_ref, *refs = refs
    mask_ref = None
    if owned.causal:
        mask_ref, *refs = refs
    q_ref, grad_out_ref, columns_ref, grad_keys_ref, grad_values_ref, *scratch = refs
    q_buffer, grad_buffer, columns_buffer, semaphores, keys_sum, values_sum = scratch
    keys_sum[...] = jnp.zeros_like(keys_sum)
    values_sum[...] = jnp.zeros_like(values_sum)
    blocks, steps, kv = owned.blocks, owned.steps_per_question, owned.kv_heads
    tile = pl.program_id(0)
    first = spans.first[tile]
    visits = (spans.last[tile] - first) * steps
    row = tile * owned.tile + jax.lax.broadcasted_iota(jnp.int32, (1, owned.tile), 1)

    def copies(visit, slot):
        question = spans.origins[first + visit // steps] // owned.selected
        at = pl.ds(visit % steps * blocks.rows, blocks.rows)
        return [
            pltpu.make_async_copy(q_ref.at[question, :, at], q_buffer.at[slot], semaphores.at[slot, 0]),
            pltpu.make_async_copy(grad_out_ref.at[question, :, at], grad_buffer.at[slot], semaphores.at[slot, 1]),
            pltpu.make_async_copy(columns_ref.at[question, at], columns_buffer.at[slot], semaphores.at[slot, 2]),
        ]

    def start(visit, slot):
        for copy in copies(visit, slot):
            copy.start()

    pl.when(visits > 0)(lambda: start(0, 0))

    def add(visit, _):
        slot = visit % 2
        pl.when(visit + 1 < visits)(lambda: start(visit + 1, (visit + 1) % 2))
        for copy in copies(visit, slot):
            copy.wait()
        at = first + visit // steps
        allowed = jnp.logical_and(row >= spans.starts[at], row < spans.ends[at])
        if owned.causal:
            token = visit % steps * blocks.tokens + token_ref[...]
            position = row - spans.starts[at]
            allowed = allowed & (mask_ref[...] > 0) & (position <= token + owned.shift)
        for head in range(kv):
            q, grad_out = q_buffer[slot, head], grad_buffer[slot, head]
            keys, values = keys_ref[:, head, :].astype(q.dtype), values_ref[:, head, :].astype(q.dtype)
            logits = product(q, keys, ((1,), (1,))) * owned.head_dim**-0.5
            if owned.bias:
                base = (spans.origins[at] * kv + head) * blocks.group
                column = jnp.zeros(group_ref.shape, jnp.float32)
                for g in range(blocks.group):
                    column = jnp.where(group_ref[...] == g, bias_ref[base + g], column)
                logits = logits + column
            lse, delta = columns_buffer[slot, :, head : head + 1], columns_buffer[slot, :, kv + head : kv + head + 1]
            weights = jnp.exp(jnp.where(allowed, logits, MASKED) - lse)
            values_sum[head] += product(weights.astype(q.dtype), grad_out, ((0,), (0,)))
            # Values outside of the range may be anything; their weights are 0, and 0 * NaN is NaN.
            grad_weights = jnp.where(allowed, product(grad_out, values, ((1,), (1,))), 0.0)
            grad_logits = weights * (grad_weights - delta)
            keys_sum[head] += product(grad_logits.astype(q.dtype), q, ((0,), (0,)))
        return 0

    jax.lax.fori_loop(0, visits, add, 0)
    for head in range(kv):
        grad_keys_ref[:, head, :] = (keys_sum[head] * owned.head_dim**-0.5).astype(grad_keys_ref.dtype)
        grad_values_ref[:, head, :] = values_sum[head].astype(grad_values_ref.dtype)


def _prepared(q, grad_out, lse, delta, kv, blocks):
    columns = jnp.concatenate(
        [head_columns(shifted_lse(lse), kv, blocks, -MASKED), head_columns(delta, kv, blocks, 0.0)], axis=-1
    )
    return to_rows(q, kv, blocks), to_rows(grad_out.astype(q.dtype), kv, blocks), columns


@functools.partial(jax.jit, static_argnames=("blocks", "causal"))
def backward(q, keys, values, starts, lengths, bias, mask, lse, delta, grad_out, *, blocks: Blocks, causal: bool):
    """Gradients of `keys`, `values` [rows, K, D] in their dtype.

    Args:
      q, grad_out: [B, T, H, D].
      starts, lengths: [B, k] int32, ranges of rows.
      bias: [B, k, H] float32 or None.
      mask: [rows] bool, with `causal` only.
      lse, delta: [B, T, H] float32.
      causal: rows are own tokens, `lengths` of them a question, aligned at the end of its queries.
    """
    b, t = q.shape[:2]
    rows, kv, d = keys.shape
    q_rows, grad_rows, columns = _prepared(q, grad_out, lse, delta, kv, blocks)
    owned = Owned(
        selected=starts.shape[1],
        rows=rows,
        kv_heads=kv,
        head_dim=d,
        steps_per_question=q_rows.shape[2] // blocks.rows,
        causal=causal,
        shift=rows // b - t,
        bias=bias is not None,
        blocks=blocks,
    )
    tile = owned.tile
    tiles = pl.cdiv(rows, tile)
    prefetched = list(ranges(starts, lengths, tile, tiles))
    if owned.bias:
        prefetched.append(bias.astype(jnp.float32).reshape(-1))
    row = jnp.arange(blocks.rows, dtype=jnp.int32)[:, None]
    inputs = [row // blocks.group, row % blocks.group, keys, values]
    column = pl.BlockSpec((blocks.rows, 1), lambda i, *_: (0, 0))
    tile_spec = pl.BlockSpec((tile, kv, d), lambda i, *_: (i, 0, 0))
    specs = [column, column, tile_spec, tile_spec]
    if causal:
        inputs.append(mask.astype(jnp.int32)[None, :])
        specs.append(pl.BlockSpec((1, tile), lambda i, *_: (0, i)))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, owned),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(tiles,),
            in_specs=[*specs, anywhere, anywhere, anywhere],
            out_specs=[tile_spec, tile_spec],
            scratch_shapes=[
                pltpu.VMEM((2, kv, blocks.rows, d), q.dtype),
                pltpu.VMEM((2, kv, blocks.rows, d), q.dtype),
                pltpu.VMEM((2, blocks.rows, 2 * kv), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 3)),
                pltpu.VMEM((kv, tile, d), jnp.float32),
                pltpu.VMEM((kv, tile, d), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
        compiler_params=params("parallel"),
        name="gather_attention_grad_" + ("own" if causal else "bank"),
    )(*prefetched, *inputs, q_rows, grad_rows, columns)
