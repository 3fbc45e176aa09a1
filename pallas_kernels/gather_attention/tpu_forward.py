"""TPU: forward pass of `gather_attention`, an online softmax over blocks as `tpu_stream` brings them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gather_attention import tpu_call
from pallas_kernels.gather_attention.reference import MASKED, Operands
from pallas_kernels.gather_attention.tpu_stream import Shape
from pallas_kernels.gather_attention.tpu_tiles import Block, bank_block, own_block, product


def _kernel(shape: Shape, *refs):
    tables, bias, rows, refs = tpu_call.unpack(shape, refs)
    stream, refs, (out_ref, lse_ref) = tpu_call.unpack_stream(shape, tables, refs, outputs=2)
    top_ref, sum_ref, out_sum_ref = refs
    top_ref[...] = jnp.full(top_ref.shape, MASKED / 2, jnp.float32)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    out_sum_ref[...] = jnp.zeros_like(out_sum_ref)

    def visit(head, block: Block):
        logits = jnp.where(block.allowed, block.logits, MASKED)
        old = top_ref[head]
        top = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        weights, shrink = jnp.exp(logits - top), jnp.exp(old - top)
        top_ref[head] = top
        sum_ref[head] = sum_ref[head] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        if block.value_scale is not None:
            weights = weights * block.value_scale
        added = product(weights.astype(block.values.dtype), block.values, ((1,), (0,)))
        out_sum_ref[head] = out_sum_ref[head] * shrink + added

    def visit_bank(question, j, o, slot):
        for head in range(shape.kv_heads):
            visit(head, bank_block(stream, rows, head, question, j, o, slot))

    def visit_own(step, o, slot):
        for head in range(shape.kv_heads):
            visit(head, own_block(stream, rows, head, step, o, slot))

    stream.run(visit_bank, visit_own)
    for head in range(shape.kv_heads):
        total = sum_ref[head]
        safe_total = jnp.where(total > 0, total, 1.0)
        out_ref[0, head] = (out_sum_ref[head] / safe_total).astype(out_ref.dtype)
        lse_ref[0, :, head : head + 1] = jnp.where(total > 0, top_ref[head] + jnp.log(safe_total), MASKED)


@functools.partial(jax.jit, static_argnames=("blocks", "cores"))
def forward(operands: Operands, *, blocks, cores: int):
    """Out and lse of `reference.forward`."""
    call = tpu_call.prepare(operands, blocks, cores)
    shape, kv = call.shape, call.shape.kv_heads
    rows_total = shape.steps_per_question * blocks.rows
    out, lse = pl.pallas_call(
        functools.partial(_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=call.prefetched,
            grid=call.grid,
            in_specs=[*call.row_specs, *call.source_specs],
            out_specs=[call.query_spec, call.column_spec()],
            scratch_shapes=[
                *call.scratch,
                pltpu.VMEM((kv, blocks.rows, 1), jnp.float32),
                pltpu.VMEM((kv, blocks.rows, 1), jnp.float32),
                pltpu.VMEM((kv, blocks.rows, shape.head_dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((shape.questions, kv, rows_total, shape.head_dim), operands.q.dtype),
            jax.ShapeDtypeStruct((shape.questions, rows_total, kv), jnp.float32),
        ],
        compiler_params=tpu_call.params("parallel", "arbitrary"),
        name="gather_attention_forward",
    )(*call.arguments)
    group = blocks.group
    return tpu_call.from_rows(out, shape.tokens, group), tpu_call.from_rows(lse.swapaxes(1, 2), shape.tokens, group)
