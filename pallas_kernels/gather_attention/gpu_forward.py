"""The forward kernel: flash attention over [chunks of the selected documents ; own tokens], Mosaic GPU on Hopper.

A block has the query rows of one question and one key/value head: rows are (token, head of the group) pairs, so
that the G heads share every tile. Consumer warpgroups have 64 rows each; the producer is in `gpu_producer`.
"""

from __future__ import annotations

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gather_attention import gpu_producer, gpu_tiles
from pallas_kernels.gather_attention.gpu_config import COLUMNS, WARPGROUP_ROWS
from pallas_kernels.gather_attention.reference import MASKED

LOG2E = math.log2(math.e)


def allowed_columns(case, smem, own, slot, index, columns, row):
    """[64, 64] bool: which columns of the tile count for the rows from `row` on."""
    shape = (WARPGROUP_ROWS, COLUMNS)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    if not own:
        return (column >= columns[0]) & (column < columns[1])
    token = (row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)) // case.group
    exists = jax.lax.broadcast_in_dim(smem["mask"][slot], shape, [1]) > 0.5
    return (column + index * COLUMNS <= token + (case.own - case.tokens)) & exists


def scaled_logits(case, smem, q, own, slot, index, columns, row, wg):
    """[64, 64] float32 logits times log2(e), MASKED where a column does not count."""
    logits = gpu_tiles.product(q, smem["k"].at[slot]) * (case.head_dim**-0.5 * LOG2E)
    if not own and case.biased:
        bias = smem["bias"][slot, pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)] * LOG2E
        logits = logits + jax.lax.broadcast_in_dim(bias, logits.shape, [0])
    allowed = allowed_columns(case, smem, own, slot, index, columns, row)
    return jnp.where(allowed, logits, MASKED)


def kernel(case, gmem, out_ref, lse_ref, smem):
    """Body of the kernel: `gmem`, `smem` name the refs; out_ref [splits, B, K, R, D], lse_ref [splits, B, K, R]."""
    wg = jax.lax.axis_index("wg")
    split, head, question = (jax.lax.axis_index(name) for name in ("split", "head", "question"))
    row = jax.lax.axis_index("rows") * case.sizes.rows
    consumer_registers, producer_registers = case.sizes.registers

    @pl.when(wg == case.sizes.consumers)
    def _():
        plgpu.set_max_registers(producer_registers, action="decrease")
        gpu_producer.produce(case, gmem, smem, question=question, head=head, row=row, split=split)

    @pl.when(wg < case.sizes.consumers)
    def _():
        plgpu.set_max_registers(consumer_registers, action="increase")
        mine = row + wg * WARPGROUP_ROWS
        for piece in range(case.pieces):
            source = gmem["q"].at[piece, question, head, pl.ds(mine, WARPGROUP_ROWS)]
            plgpu.copy_gmem_to_smem(source, smem["q"].at[wg, piece], smem["q_loaded"].at[wg])
        plgpu.barrier_wait(smem["q_loaded"].at[wg])
        plgpu.barrier_wait(smem["planned"])
        scratch = smem["left"].at[wg] if "left" in smem else None

        def body(own, step, j, index, columns, carry):
            acc, top, total = carry
            slot = jax.lax.rem(step, case.sizes.stages)
            plgpu.barrier_wait(smem["ready"].at[slot])
            logits = scaled_logits(case, smem, smem["q"].at[wg], own, slot, index, columns, mine, wg)
            new_top = jnp.maximum(top, jnp.max(logits, axis=1))
            weights = jnp.exp2(logits - jax.lax.broadcast_in_dim(new_top, logits.shape, [0]))
            shrink = jnp.exp2(top - new_top)
            total = total * shrink + jnp.sum(weights, axis=1)
            acc = acc * jax.lax.broadcast_in_dim(shrink, acc.shape, [0])
            acc = gpu_tiles.accumulate(acc, weights, smem["v"].at[slot], scratch)
            plgpu.barrier_arrive(smem["consumed"].at[slot])
            return acc, new_top, total

        layout = plgpu.Layout.WGMMA
        acc = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, case.head_dim), jnp.float32), layout)
        # Far above MASKED, so that masked weights are exactly 0, in a row of nothing else too.
        top = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), MASKED / 2, jnp.float32), layout.reduce(1))
        total = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), layout.reduce(1))
        (acc, top, total), _ = gpu_tiles.walk(case, smem, row + case.sizes.rows, split, body, (acc, top, total))
        safe_total = jnp.where(total > 0, total, 1.0)
        out = acc / jax.lax.broadcast_in_dim(safe_total, acc.shape, [0])
        rows = pl.ds(mine, WARPGROUP_ROWS)
        target = out_ref.at[split, question, head, rows]
        if out_ref.dtype == jnp.float32:
            target[...] = out
        else:
            # Rows of half the bytes would fill half a sector of memory each: the copy engine takes them from where
            # the queries were, which nobody needs any more.
            staged = smem["q"].at[wg, 0]
            staged[...] = out.astype(out_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, target)
            plgpu.wait_smem_to_gmem(0)
        lse_ref[split, question, head, rows] = jnp.where(total > 0, top / LOG2E + jnp.log(safe_total), MASKED)


def launch(case, gmem):
    """Out [splits, B, K, R, D], in q's dtype or, if there is something to merge, float32; lse [splits, B, K, R]."""
    sizes = case.sizes
    _, b, kv, rows, d = gmem["q"].shape
    out_dtype = case.dtype if sizes.splits == 1 else jnp.float32
    scratch = gpu_producer.tile_buffers(case) | gpu_tiles.left_scratch(sizes.consumers, case.pieces)
    scratch |= dict(
        q=gpu_tiles.swizzled((sizes.consumers, case.pieces, WARPGROUP_ROWS, d), jnp.bfloat16),
        q_loaded=plgpu.Barrier(num_arrivals=case.pieces, num_barriers=sizes.consumers),
    )
    names = list(gmem)

    def body(*refs, smem):
        kernel(case, dict(zip(names, refs, strict=False)), *refs[len(names) :], smem)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((sizes.splits, b, kv, rows, d), out_dtype),
            jax.ShapeDtypeStruct((sizes.splits, b, kv, rows), jnp.float32),
        ),
        scratch_types=dict(smem=scratch),
        grid=(sizes.splits, rows // sizes.rows, kv, b),
        grid_names=("split", "rows", "head", "question"),
        num_threads=sizes.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*gmem.values())
