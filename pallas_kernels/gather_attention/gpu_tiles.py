"""What the GPU kernels share: the walk over a question's tiles, the warpgroup that makes them ready, the products.

A tile is 64 chunks of one selected document, or 64 own tokens. TMA reaches every eighth row of what wgmma reads, so
a document's tiles begin up to 7 chunks before it, and those do not count. The last warpgroup of a block loads tiles
by TMA from where they lie and makes them ready: it zeroes the rows that do not count, since a weight of 0 would not
keep a NaN out of a product, and turns int8 and float32 content into bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools

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

# What the producer must do with a tile before it is used; a bank tile is told by the columns that count.
NO_TILE, OWN_DIRTY, OWN_CLEAN = 0, -1, -2
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
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def plan_length(documents: int, own: int) -> int:
    """Numbers of a question's plan: four per document (see `plan`), the number of tiles, a flag per own tile."""
    return -(-(4 * documents + 1 + -(-own // COLUMNS)) // 32) * 32


def plan(operands) -> jax.Array:
    """[B, plan_length] int32: everything a block reads to find its tiles, in one copy.

    Per document: the aligned chunk where its tiles begin, the columns from there where it begins and ends, and the
    tiles of the documents before it.
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
    row = jnp.concatenate([starts - lead, lead, lead + lengths, ends - tiles, total, clean], axis=1).astype(jnp.int32)
    return jnp.pad(row, ((0, 0), (0, plan_length(starts.shape[1], mask.shape[1]) - row.shape[1])))


def tile_buffers(case: Case):
    """Shared memory of the pipeline: what `produce` fills and consumers read."""
    stages, d = case.sizes.stages, case.head_dim
    tile = swizzled((stages, case.pieces, COLUMNS, d), jnp.bfloat16)
    buffers = dict(
        plan=plgpu.SMEM((plan_length(case.documents, case.own),), jnp.int32),
        k=tile,
        v=tile,
        mask=plgpu.SMEM((stages, COLUMNS), jnp.float32) if case.own else None,
        bias=plgpu.SMEM((stages, case.sizes.rows), jnp.float32) if case.biased else None,
        raw_k=swizzled((stages, COLUMNS, d), case.bank_dtype) if case.converted else None,
        raw_v=swizzled((stages, COLUMNS, d), case.bank_dtype) if case.converted else None,
        scale_k=plgpu.SMEM((stages, COLUMNS), jnp.float32) if case.int8 else None,
        scale_v=plgpu.SMEM((stages, COLUMNS), jnp.float32) if case.int8 else None,
        planned=plgpu.Barrier(),
        loaded=plgpu.Barrier(num_arrivals=case.copies, num_barriers=stages),
        ready=plgpu.Barrier(num_barriers=stages),
        consumed=plgpu.Barrier(num_arrivals=case.sizes.consumers, num_barriers=stages),
    )
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def walk(case: Case, smem, rows_end, split, body, carry):
    """Fold `body(own, step, document, index, columns, carry)` over the tiles that this block has.

    `own` is static. `step` counts the tiles of this block; the tile is the `index`-th of its document or of the own
    tokens; its columns from `columns[0]` up to `columns[1]` are of the document (own tiles: None).

    Args:
      rows_end: one past the last row of the block, so that own tiles after its last token are left out.
      split: which of `case.sizes.splits` equal shares of the tiles this block has.

    Returns:
      The carry and the number of tiles.
    """
    k, splits, numbers = case.documents, case.sizes.splits, smem["plan"]
    bank_tiles = numbers[4 * k]
    last_token = jnp.minimum((rows_end - 1) // case.group, case.tokens - 1)
    own_tiles = (last_token + (case.own - case.tokens)) // COLUMNS + 1 if case.own else 0
    total = bank_tiles + own_tiles
    low, high = total * split // splits, total * (split + 1) // splits

    def over(first, after, carry, fn):
        begin, end = jnp.maximum(low, first), jnp.minimum(high, after)
        return jax.lax.fori_loop(begin, end, lambda tile, c: fn(tile - low, tile - first, c), carry)

    def document(j, carry):
        lead, end = numbers[k + j], numbers[2 * k + j]

        def tile(step, i, carry):
            passed = i * COLUMNS
            columns = jnp.maximum(lead - passed, 0), jnp.minimum(end - passed, COLUMNS)
            return body(False, step, j, i, columns, carry)

        # The next number is the first tile of the document after, or the number of all tiles.
        return over(numbers[3 * k + j], numbers[3 * k + j + 1], carry, tile)

    if k:
        carry = jax.lax.fori_loop(0, k, document, carry)
    if case.own:
        carry = over(bank_tiles, total, carry, lambda step, i, c: body(True, step, 0, i, None, c))
    return carry, high - low


def produce(case: Case, gmem, smem, *, question, head, row, split):
    """The producer's part: loads every tile of the block and hands it over when its values are fit for a product."""
    stages, lag = case.sizes.stages, case.sizes.lag
    k_source, v_source = ("raw_k", "raw_v") if case.converted else ("k", "v")

    def load(own, step, j, i):
        slot = jax.lax.rem(step, stages)
        barrier = smem["loaded"].at[slot]
        copied = 0

        def copy(source, target):
            nonlocal copied
            copied += 1
            plgpu.copy_gmem_to_smem(source, target, barrier)

        if own:
            columns = pl.ds(pl.multiple_of(i * COLUMNS, COLUMNS), COLUMNS)
            for piece in range(case.pieces):
                copy(gmem["k"].at[piece, question, columns, head], smem["k"].at[slot, piece])
                copy(gmem["v"].at[piece, question, columns, head], smem["v"].at[slot, piece])
            copy(gmem["mask"].at[question, columns], smem["mask"].at[slot])
        else:
            start = pl.multiple_of(smem["plan"][j] + i * COLUMNS, ALIGNMENT)
            chunks = pl.ds(start, COLUMNS)
            for source, target in ((gmem["bank_k"], k_source), (gmem["bank_v"], v_source)):
                tile = smem[target].at[slot] if case.converted else smem[target].at[slot, 0]
                copy(source.at[chunks, head], tile)
            if case.biased:
                copy(gmem["bias"].at[question, head, j, pl.ds(row, case.sizes.rows)], smem["bias"].at[slot])
            if case.int8:
                flat = pl.ds(head * gmem["bank_k"].shape[0] + start, COLUMNS)
                copy(gmem["scale_k"].at[flat], smem["scale_k"].at[slot])
                copy(gmem["scale_v"].at[flat], smem["scale_v"].at[slot])
        for _ in range(case.copies - copied):
            plgpu.barrier_arrive(barrier)

    def zero_rows(slot, keep):
        for name in ("k", "v") if case.clean_keys else ("v",):
            for piece in range(case.pieces):
                tile = smem[name].at[slot, piece]
                tile[...] = jnp.where(keep, tile[...], jnp.zeros((), jnp.bfloat16))
        plgpu.commit_smem()

    def convert(slot, keep):
        for name in ("k", "v"):
            wide = smem[f"raw_{name}"][slot].astype(jnp.float32)
            if case.int8:
                scale = smem[f"scale_{name}"][slot]
                wide = wide * jax.lax.broadcast_in_dim(scale, wide.shape, [0])
            for piece, value in enumerate(split_pieces(jnp.where(keep, wide, 0.0), case.pieces)):
                smem[name][slot, piece] = value
        plgpu.commit_smem()

    def finish(step, code):
        slot = jax.lax.rem(step, stages)
        shape = (COLUMNS, case.head_dim)
        plgpu.barrier_wait(smem["loaded"].at[slot])

        def counts():
            row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            return (row >= code // 256) & (row < code % 256)

        if case.own:

            @pl.when(code == OWN_DIRTY)
            def _():
                zero_rows(slot, jax.lax.broadcast_in_dim(smem["mask"][slot], shape, [0]) > 0.5)

        if case.documents and case.converted:

            @pl.when(code > 0)
            def _():
                convert(slot, counts())

        elif case.documents:

            @pl.when((code > 0) & (code != COLUMNS))
            def _():
                zero_rows(slot, counts())

        plgpu.barrier_arrive(smem["ready"].at[slot])

    def body(own, step, j, i, columns, pending):
        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(smem["consumed"].at[jax.lax.rem(step, stages)])

        load(own, step, j, i)
        if own:
            flag = smem["plan"][4 * case.documents + 1 + i]
            code = jnp.where(flag == 1, OWN_CLEAN, OWN_DIRTY)
        else:
            code = columns[0] * 256 + columns[1]
        pending = (*pending, jnp.asarray(code, jnp.int32))
        pl.when(pending[0] != NO_TILE)(lambda: finish(step - lag, pending[0]))
        return pending[1:]

    plgpu.copy_gmem_to_smem(gmem["plan"].at[question], smem["plan"], smem["planned"])
    plgpu.barrier_wait(smem["planned"])
    pending, steps = walk(case, smem, row + case.sizes.rows, split, body, (jnp.asarray(NO_TILE, jnp.int32),) * lag)
    for behind, code in enumerate(pending):
        pl.when(code != NO_TILE)(functools.partial(finish, steps - lag + behind, code))


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


def left_scratch(case: Case):
    """What `accumulate` needs beside registers, per consumer: nothing on a device."""
    if not dispatch.interpreted():
        return {}
    return dict(left=swizzled((case.sizes.consumers, case.pieces, WARPGROUP_ROWS, COLUMNS), jnp.bfloat16))
