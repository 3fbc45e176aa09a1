"""TPU: gradients of `gather_attention` for queries and biases, over the same stream of blocks as the forward pass."""

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
    tables, _, rows, refs = tpu_call.unpack(shape, refs)
    (grad_out_ref, lse_ref, delta_ref), refs = refs[:3], refs[3:]
    outputs = 1 + shape.bias
    stream, (sum_ref, *bias_sum_ref), outs = tpu_call.unpack_stream(shape, tables, refs, outputs=outputs)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    for ref in bias_sum_ref:
        ref[...] = jnp.zeros_like(ref)

    def visit(head, block: Block):
        """Adds to the gradient of the queries; returns that of the logits, [rows, columns]."""
        grad_out = grad_out_ref[0, head]
        weights = jnp.exp(jnp.where(block.allowed, block.logits, MASKED) - lse_ref[0, :, head : head + 1])
        grad_weights = product(grad_out, block.values, ((1,), (1,)))
        if block.value_scale is not None:
            grad_weights = grad_weights * block.value_scale
        grad_logits = weights * (grad_weights - delta_ref[0, :, head : head + 1])
        scaled = grad_logits if block.key_scale is None else grad_logits * block.key_scale
        sum_ref[head] += product(scaled.astype(block.keys.dtype), block.keys, ((1,), (0,)))
        return grad_logits

    def visit_bank(question, j, o, slot):
        for head in range(shape.kv_heads):
            grad_logits = visit(head, bank_block(stream, rows, head, question, j, o, slot))
            if shape.bias:
                document = tables.documents[question * shape.selected + j]
                column = jax.lax.broadcasted_iota(jnp.int32, (1, shape.selected), 1) == document
                per_row = jnp.sum(grad_logits, axis=1, keepdims=True)
                bias_sum_ref[0][head] += jnp.where(column, per_row, 0.0)

    def visit_own(step, o, slot):
        for head in range(shape.kv_heads):
            visit(head, own_block(stream, rows, head, step, o, slot))

    stream.run(visit_bank, visit_own)
    group = rows.group[...] == jax.lax.broadcasted_iota(jnp.int32, (1, shape.blocks.group), 1)
    for head in range(shape.kv_heads):
        outs[0][0, head] = (sum_ref[head] * shape.head_dim**-0.5).astype(outs[0].dtype)
        if shape.bias:
            # Sum over the tokens of each query head.
            outs[1][0, head] = product(group.astype(jnp.float32), bias_sum_ref[0][head], ((0,), (0,)))


def head_columns(x: jax.Array, kv: int, blocks, fill: float) -> jax.Array:
    """[B, T, H] -> [B, rows, K]: one number a row and key/value head; `fill` for the rows that only pad."""
    padding = -x.shape[1] % blocks.tokens
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)), constant_values=fill)
    return tpu_call.to_rows(x, kv, blocks).swapaxes(1, 2)


def shifted_lse(lse: jax.Array) -> jax.Array:
    """lse such that exp(MASKED - lse) is 0 for a row with nothing to attend to, too."""
    return jnp.maximum(lse, MASKED / 2)


@functools.partial(jax.jit, static_argnames=("blocks", "cores"))
def backward(operands: Operands, lse, delta, grad_out, *, blocks, cores: int):
    """Gradients of q [B, T, H, D] in its dtype and of bias [B, k, H] float32 (None without a bias).

    Args:
      lse, delta: [B, T, H] float32, of the forward pass and `reference.shifted_delta`.
    """
    call = tpu_call.prepare(operands, blocks, cores)
    shape, kv = call.shape, call.shape.kv_heads
    group, tokens = blocks.group, shape.tokens
    rows_total = shape.steps_per_question * blocks.rows
    column_spec = call.column_spec()
    extra = [
        tpu_call.to_rows(grad_out.astype(operands.q.dtype), kv, blocks),
        head_columns(shifted_lse(lse), kv, blocks, -MASKED),
        head_columns(delta, kv, blocks, 0.0),
    ]
    at = len(call.arguments) - len(call.source_specs)
    out_specs = [call.query_spec]
    out_shape = [jax.ShapeDtypeStruct((shape.questions, kv, rows_total, shape.head_dim), operands.q.dtype)]
    scratch = [pltpu.VMEM((kv, blocks.rows, shape.head_dim), jnp.float32)]
    if shape.bias:
        per_step = (kv, group, shape.selected)
        out_specs.append(pl.BlockSpec((1, *per_step), lambda *i: (call.step(i), 0, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((shape.steps, *per_step), jnp.float32))
        scratch.append(pltpu.VMEM((kv, blocks.rows, shape.selected), jnp.float32))
    grad_rows, *grad_bias = pl.pallas_call(
        functools.partial(_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=call.prefetched,
            grid=call.grid,
            in_specs=[*call.row_specs, call.query_spec, column_spec, column_spec, *call.source_specs],
            out_specs=out_specs,
            scratch_shapes=[*call.scratch, *scratch],
        ),
        out_shape=out_shape,
        compiler_params=tpu_call.params("parallel", "arbitrary"),
        name="gather_attention_grad_query",
    )(*call.arguments[:at], *extra, *call.arguments[at:])
    grad_q = tpu_call.from_rows(grad_rows, tokens, group)
    if not shape.bias:
        return grad_q, None
    per_step = grad_bias[0].reshape(shape.questions, shape.steps_per_question, kv * group, shape.selected)
    return grad_q, jnp.sum(per_step, axis=1).swapaxes(1, 2)

