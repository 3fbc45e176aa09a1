"""What the GPU kernels share: the walk over a question's tiles, and products of numbers in pieces.

A tile is 64 chunks of one selected document, or 64 own tokens. TMA reaches every eighth row of what wgmma reads, so
a document's tiles begin up to 7 chunks before it, and those do not count.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.gather_attention.gpu_config import (
    ALIGNMENT,
    COLUMNS,
    WARPGROUP_ROWS,
    Sizes,
    bank_is_converted,
    pieces,
)

PLAN_ROW = 32
# Products of the pieces of two numbers that a float32 product needs; the rest is below its rounding.
PRODUCTS = {1: ((0, 0),), 3: ((0, 2), (2, 0), (1, 1), (0, 1), (1, 0), (0, 0))}


@dataclasses.dataclass(frozen=True)
class Case:
    """The static facts of a launch."""

    sizes: Sizes
    tokens: int  # T
    own: int  # S
    group: int  # G
    head_dim: int
    documents: int  # k, 0 without a bank
    scales: int  # of one head of one layer of the bank
    dtype: object
    bank_dtype: object
    biased: bool
    clean_keys: bool  # keys are a right-hand side too (backward): their rows that do not count are zeroed

    @property
    def pieces(self) -> int:
        return pieces(self.dtype)

    @property
    def converted(self) -> bool:
        return bank_is_converted(self.dtype, self.bank_dtype)

    @property
    def int8(self) -> bool:
        return self.bank_dtype == jnp.int8

    @property
    def copies(self) -> int:
        """Copies of a stage: every one arrives once at its barrier."""
        return max(2 + self.biased + 2 * self.int8, 2 * self.pieces + 1 if self.own else 0)


def swizzled(shape, dtype):
    """A tile in shared memory in the layout that wgmma reads; the last axis is the contiguous one."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    if swizzle == 16:  # int8 rows of an odd multiple of 16 bytes, which no product reads
        return plgpu.SMEM(shape, dtype)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def plan_shape(documents: int, own: int) -> tuple[int, int]:
    """Of a question's plan: rows of 32, as TMA copies no more than 256 numbers of an axis."""
    return -(-(4 * documents + 2 + -(-own // COLUMNS)) // PLAN_ROW), PLAN_ROW


def planned(smem, i):
    """The i-th number of the plan."""
    return smem["plan"][i // PLAN_ROW, i % PLAN_ROW]


def plan(operands) -> jax.Array:
    """[B, *plan_shape] int32: everything a block reads to find its tiles, in one copy.

    Per document: the aligned chunk where its tiles begin, the columns from there where it begins and ends, and the
    tiles of the documents before it. Then the number of all their tiles, where the layer's scales of head 0 are,
    relative to its chunks, and a flag per tile of own tokens: all exist.
    """
    starts, lengths, mask = operands.starts, operands.lengths, operands.mask
    if not operands.bank_k.shape[0]:
        starts, lengths = starts[:, :0], lengths[:, :0]
    lead = starts % ALIGNMENT
    tiles = jnp.where(lengths > 0, -(-(lead + lengths) // COLUMNS), 0)
    ends = jnp.cumsum(tiles, axis=1)
    total = ends[:, -1:] if tiles.shape[1] else jnp.zeros((starts.shape[0], 1), jnp.int32)
    padded = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % COLUMNS)), constant_values=True)
    clean = jnp.all(padded.reshape(mask.shape[0], -1, COLUMNS), axis=2)
    shift = jnp.zeros_like(total)
    if operands.layer is not None and operands.bank_k_scale is not None:
        _, kv, chunks = operands.bank_k_scale.shape
        shift = shift + operands.layer * (kv - 1) * chunks
    row = jnp.concatenate([starts - lead, lead, lead + lengths, ends - tiles, total, shift, clean], axis=1)
    row = row.astype(jnp.int32)
    shape = plan_shape(starts.shape[1], mask.shape[1])
    return jnp.pad(row, ((0, 0), (0, shape[0] * shape[1] - row.shape[1]))).reshape(-1, *shape)


def walk(case: Case, smem, rows_end, split, body, carry, after=None):
    """Fold `body(own, step, document, index, columns, carry)` over the tiles that this block has.

    `own` is static. `step` counts the tiles of this block; the tile is the `index`-th of its document or of the own
    tokens; its columns from `columns[0]` up to `columns[1]` are of the document (own tiles: None).

    Args:
      rows_end: one past the last row of the block, so that own tiles after its last token are left out.
      split: which of `case.sizes.splits` equal shares of the tiles this block has.
      after: `after(document, carry)`, called once for every document, whether it has tiles here or not.

    Returns:
      The carry and the number of tiles.
    """
    k, splits = case.documents, case.sizes.splits
    bank_tiles = planned(smem, 4 * k)
    last_token = jnp.minimum((rows_end - 1) // case.group, case.tokens - 1)
    own_tiles = (last_token + (case.own - case.tokens)) // COLUMNS + 1 if case.own else 0
    total = bank_tiles + own_tiles
    low, high = total * split // splits, total * (split + 1) // splits

    def over(first, after, carry, fn):
        begin, end = jnp.maximum(low, first), jnp.minimum(high, after)
        return jax.lax.fori_loop(begin, end, lambda tile, c: fn(tile - low, tile - first, c), carry)

    def document(j, carry):
        lead, end = planned(smem, k + j), planned(smem, 2 * k + j)

        def tile(step, i, carry):
            passed = i * COLUMNS
            columns = jnp.maximum(lead - passed, 0), jnp.minimum(end - passed, COLUMNS)
            return body(False, step, j, i, columns, carry)

        # The next number is the first tile of the document after, or the number of all tiles.
        carry = over(planned(smem, 3 * k + j), planned(smem, 3 * k + j + 1), carry, tile)
        return after(j, carry) if after else carry

    if k:
        carry = jax.lax.fori_loop(0, k, document, carry)
    if case.own:
        carry = over(bank_tiles, total, carry, lambda step, i, c: body(True, step, 0, i, None, c))
    return carry, high - low


def split_pieces(x, count: int):
    """`x` float32, inside a kernel, as `count` bfloat16 numbers that add up to it, the largest first."""
    parts = []
    for _ in range(count):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return parts


def product(left, right):
    """left [p, m, d] times right [p, n, d], transposed, both in shared memory: [m, n] float32."""

    def compute(acc):
        for i, j in PRODUCTS[left.shape[0]]:
            plgpu.wgmma(acc, left.at[i], right.at[j].transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC((left.shape[1], right.shape[1]), jnp.float32))


def accumulate(acc, left, right, scratch):
    """acc [m, d] plus `left` [m, n] float32, in registers, times right [p, n, d] in shared memory.

    The interpreter of Pallas has neither products with an operand in registers nor accumulators that start from a
    value, so there the left side goes through `scratch` [p, m, n] in shared memory (None on a device).
    """
    parts = split_pieces(left, right.shape[0])
    if scratch is None:

        def compute(ref):
            for i, j in PRODUCTS[len(parts)]:
                plgpu.wgmma(ref, parts[i], right.at[j])

        return pl.run_state(compute)(plgpu.ACC.init(acc))

    for i, part in enumerate(parts):
        scratch[i] = part
    plgpu.commit_smem()

    def interpreted(ref):
        for i, j in PRODUCTS[len(parts)]:
            plgpu.wgmma(ref, scratch.at[i], right.at[j])
        return ref[...]

    return acc + pl.run_scoped(interpreted, plgpu.ACC(acc.shape, jnp.float32))


def left_scratch(consumers: int, pieces: int):
    """What `accumulate` needs beside registers, per consumer: nothing on a device."""
    if not dispatch.interpreted():
        return {}
    return dict(left=swizzled((consumers, pieces, WARPGROUP_ROWS, COLUMNS), jnp.bfloat16))
