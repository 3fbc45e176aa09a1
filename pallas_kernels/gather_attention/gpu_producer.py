"""The warpgroup of a block that loads tiles and makes them ready for the others.

It loads by TMA from where chunks and tokens lie. It zeroes the rows that do not count, since a weight of 0 would not
keep a NaN out of a product, and turns int8 and float32 content into bfloat16. It works ahead of the consumers.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gather_attention.gpu_config import ALIGNMENT, COLUMNS
from pallas_kernels.gather_attention.gpu_tiles import Case, plan_shape, planned, split_pieces, swizzled, walk

# What must be done with a tile before it is used; a bank tile is told by the columns that count.
NO_TILE, OWN_DIRTY, OWN_CLEAN = 0, -1, -2


def tile_buffers(case: Case):
    """Shared memory of the pipeline: what `produce` fills and consumers read."""
    stages, d = case.sizes.stages, case.head_dim
    tile = swizzled((stages, case.pieces, COLUMNS, d), jnp.bfloat16)
    buffers = dict(
        plan=plgpu.SMEM(plan_shape(case.documents, case.own), jnp.int32),
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
            start = pl.multiple_of(planned(smem, j) + i * COLUMNS, ALIGNMENT)
            chunks = pl.ds(start, COLUMNS)
            for source, target in ((gmem["bank_k"], k_source), (gmem["bank_v"], v_source)):
                tile = smem[target].at[slot] if case.converted else smem[target].at[slot, 0]
                copy(source.at[chunks, head], tile)
            if case.biased:
                copy(gmem["bias"].at[question, head, j, pl.ds(row, case.sizes.rows)], smem["bias"].at[slot])
            if case.int8:
                flat = pl.ds(head * case.scales + planned(smem, 4 * case.documents + 1) + start, COLUMNS)
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
            # Rows that are not swizzled have bank conflicts.
            raw = plgpu.load(smem[f"raw_{name}"].at[slot], optimized=case.head_dim % 32 == 0)
            wide = raw.astype(jnp.float32)
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
            flag = planned(smem, 4 * case.documents + 2 + i)
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

    # Every use of a slot is awaited, as the barriers demand of who waits for one of them.
    for slot in range(stages):
        pl.when(steps > slot)(functools.partial(plgpu.barrier_wait, smem["consumed"].at[slot]))
