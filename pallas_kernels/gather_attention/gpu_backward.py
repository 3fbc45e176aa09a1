"""Gradients of queries and biases: the forward's walk once more, with the weights computed anew from lse.

With weights p = exp(logits - lse): d logits = p * (grad_out . value - delta), where delta is
`reference.shifted_delta`.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gather_attention import gpu_producer, gpu_tiles
from pallas_kernels.gather_attention.gpu_config import COLUMNS, WARPGROUP_ROWS
from pallas_kernels.gather_attention.gpu_forward import scaled_logits


def kernel(case, gmem, grad_q_ref, grad_bias_ref, smem):
    """Body: grad_q_ref [splits, B, K, R, D], grad_bias_ref [splits, B, K, k, R] per row, or None."""
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
        rows = pl.ds(mine, WARPGROUP_ROWS)
        loaded = smem["rows_loaded"].at[wg]
        for piece in range(case.pieces):
            for name in ("q", "grad_out"):
                plgpu.copy_gmem_to_smem(gmem[name].at[piece, question, head, rows], smem[name].at[wg, piece], loaded)
        for name in ("lse", "delta"):
            plgpu.copy_gmem_to_smem(gmem[name].at[question, head, rows], smem[name].at[wg], loaded)
        plgpu.barrier_wait(loaded)
        plgpu.barrier_wait(smem["planned"])
        layout = plgpu.Layout.WGMMA
        lse = plgpu.load(smem["lse"].at[wg], layout=layout.reduce(1))
        delta = plgpu.load(smem["delta"].at[wg], layout=layout.reduce(1))
        scratch = smem["left"].at[wg] if "left" in smem else None
        shape = (WARPGROUP_ROWS, COLUMNS)

        def body(own, step, j, index, columns, carry):
            acc, sums = carry
            slot = jax.lax.rem(step, case.sizes.stages)
            plgpu.barrier_wait(smem["ready"].at[slot])
            logits = scaled_logits(case, smem, smem["q"].at[wg], own, slot, index, columns, mine, wg)
            weights = jnp.exp2(logits - jax.lax.broadcast_in_dim(lse, shape, [0]))
            grad_weights = gpu_tiles.product(smem["grad_out"].at[wg], smem["v"].at[slot])
            grad_logits = weights * (grad_weights - jax.lax.broadcast_in_dim(delta, shape, [0]))
            acc = gpu_tiles.accumulate(acc, grad_logits, smem["k"].at[slot], scratch)
            plgpu.barrier_arrive(smem["consumed"].at[slot])
            return acc, sums if own or not case.biased else sums + jnp.sum(grad_logits, axis=1)

        def zeros():
            return plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), layout.reduce(1))

        def after(j, carry):
            acc, sums = carry
            if case.biased:
                grad_bias_ref[split, question, head, j, rows] = sums
            return acc, zeros()

        acc = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, case.head_dim), jnp.float32), layout)
        (acc, _), _ = gpu_tiles.walk(case, smem, row + case.sizes.rows, split, body, (acc, zeros()), after)
        grad_q_ref[split, question, head, rows] = acc * case.head_dim**-0.5


def launch(case, gmem):
    """Gradient of q [splits, B, K, R, D] and, per row, of the biases [splits, B, K, k, R] or None; float32."""
    sizes = case.sizes
    _, b, kv, rows, d = gmem["q"].shape
    scratch = gpu_producer.tile_buffers(case) | gpu_tiles.left_scratch(sizes.consumers, case.pieces)
    operand = gpu_tiles.swizzled((sizes.consumers, case.pieces, WARPGROUP_ROWS, d), jnp.bfloat16)
    vector = plgpu.SMEM((sizes.consumers, WARPGROUP_ROWS), jnp.float32)
    loaded = plgpu.Barrier(num_arrivals=2 * case.pieces + 2, num_barriers=sizes.consumers)
    scratch |= dict(q=operand, grad_out=operand, lse=vector, delta=vector, rows_loaded=loaded)
    outs = [jax.ShapeDtypeStruct((sizes.splits, b, kv, rows, d), jnp.float32)]
    if case.biased:
        outs.append(jax.ShapeDtypeStruct((sizes.splits, b, kv, case.documents, rows), jnp.float32))
    names = list(gmem)

    def body(*refs, smem):
        refs = (*refs, None)
        kernel(case, dict(zip(names, refs, strict=False)), *refs[len(names) : len(names) + 2], smem)

    grads = plgpu.kernel(
        body,
        out_type=tuple(outs),
        scratch_types=dict(smem=scratch),
        grid=(sizes.splits, rows // sizes.rows, kv, b),
        grid_names=("split", "rows", "head", "question"),
        num_threads=sizes.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*gmem.values())
    return grads if case.biased else (*grads, None)
