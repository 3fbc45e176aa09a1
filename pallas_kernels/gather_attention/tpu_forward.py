"""TPU: forward pass of `gather_attention`, an online softmax over blocks as `tpu_stream` brings them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.gather_attention import tpu_stream
from pallas_kernels.gather_attention.reference import MASKED, Operands
from pallas_kernels.gather_attention.tpu_stream import Shape, Sources, Stream, Tables


def product(a, b, dimensions):
    """Matrix product with float32 sums; operands in float32 are multiplied in full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (dimensions, ((), ())), precision=precision, preferred_element_type=jnp.float32)


class Block(NamedTuple):
    """What one block of chunks or own tokens is to the rows of a step, for one key/value head."""

    keys: jax.Array  # [columns, D] in q's dtype; 0 where no row may look
    values: jax.Array  # [columns, D], likewise
    logits: jax.Array  # [rows, columns] float32
    allowed: jax.Array  # [rows or 1, columns]
    key_scale: jax.Array | None  # [1, columns] float32
    value_scale: jax.Array | None


def bias_column(bias_ref, group_ref, shape: Shape, question, document, head):
    """[rows, 1] bias of a document for the query heads of key/value head `head`."""
    group = shape.blocks.group
    first = ((question * shape.selected + document) * shape.kv_heads + head) * group
    column = jnp.zeros(group_ref.shape, jnp.float32)
    for g in range(group):
        column = jnp.where(group_ref[...] == g, bias_ref[first + g], column)
    return column


class Rows(NamedTuple):
    """References that every kernel over query rows has."""

    q: jax.Array  # [1, K, rows, D]
    token: jax.Array  # [rows, 1] int32, token of a row within the block
    group: jax.Array  # [rows, 1] int32, query head of a row within its group
    mask: jax.Array | None  # [1, own blocks, own] int32
    bias: jax.Array | None  # [B * k * H] float32 in SMEM


def bank_block(stream: Stream, rows: Rows, head, question, j, o, slot) -> Block:
    shape, buffers = stream.shape, stream.buffers
    wanted, start = stream.chunk_start(question, j, o)
    at = question * shape.selected + j
    end = stream.tables.starts[at] + stream.tables.lengths[at]
    allowed = _between(wanted, end, start, (1, shape.blocks.chunks))
    allowed_rows = _between(wanted, end, start, (shape.blocks.chunks, 1))
    keys, values, logits = _dots(rows.q, buffers.bank_k, buffers.bank_v, allowed_rows, shape, head, slot)
    key_scale = value_scale = None
    if shape.int8:
        # The window begins at a multiple of 128: turn it until the chunk that was read first is first.
        _, before = stream.scale_start(start)
        shift = (shape.scale_window - before) % shape.scale_window
        turn = lambda ref: pltpu.roll(ref[slot], shift, 1)[head : head + 1, : shape.blocks.chunks]  # noqa: E731
        key_scale = jnp.where(allowed, turn(buffers.scale_k), 0.0)
        value_scale = jnp.where(allowed, turn(buffers.scale_v), 0.0)
        logits = logits * key_scale
    if shape.bias:
        logits = logits + bias_column(rows.bias, rows.group, shape, question, stream.tables.documents[at], head)
    return Block(keys, values, logits, allowed, key_scale, value_scale)


def own_block(stream: Stream, rows: Rows, head, step, o, slot) -> Block:
    shape, own = stream.shape, stream.shape.blocks.own
    token = (step % shape.steps_per_question) * shape.blocks.tokens + rows.token[...]
    position = o * own + jax.lax.broadcasted_iota(jnp.int32, (1, own), 1)
    exists = rows.mask[0, pl.ds(o, 1), :] > 0
    allowed = jnp.logical_and(position <= token + (shape.own - shape.tokens), exists)
    within = _between(0, shape.own, o * own, (own, 1))
    keys, values, logits = _dots(rows.q, stream.buffers.own_k, stream.buffers.own_v, within, shape, head, slot)
    return Block(keys, values, logits, allowed, None, None)


def _between(first, end, start, shape):
    index = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if shape[1] == 1 else 1)
    return jnp.logical_and(index >= first, index < end)


def _dots(q_ref, keys_ref, values_ref, allowed_rows, shape, head, slot):
    dtype = q_ref.dtype
    # Behind the end lies another document, or nothing: 0 * NaN is NaN.
    keys = jnp.where(allowed_rows, keys_ref[slot, :, head, :].astype(dtype), 0)
    values = jnp.where(allowed_rows, values_ref[slot, :, head, :].astype(dtype), 0)
    return keys, values, product(q_ref[0, head], keys, ((1,), (1,))) * shape.head_dim**-0.5


def _kernel(shape: Shape, *refs):
    tables, bias, rows, refs = unpack(shape, refs)
    stream, refs, (out_ref, lse_ref) = unpack_stream(shape, tables, refs, outputs=2)
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


def unpack(shape: Shape, refs):
    """Tables, bias and rows at the head of a kernel's references, and the rest."""
    tables, refs = Tables(*refs[:5]), refs[5:]
    bias = None
    if shape.bias:
        bias, refs = refs[0], refs[1:]
    q, token, group, refs = refs[0], refs[1], refs[2], refs[3:]
    mask = None
    if shape.own:
        mask, refs = refs[0], refs[1:]
    return tables, bias, Rows(q, token, group, mask, bias), refs


def unpack_stream(shape: Shape, tables: Tables, refs, *, outputs: int):
    """The stream, the remaining references, and the outputs."""
    count = 2 + 2 * bool(shape.own) + 2 * shape.int8
    sources, refs = _sources(shape, refs[:count]), refs[count:]
    outs, refs = refs[:outputs], refs[outputs:]
    buffers, refs = _sources(shape, refs[:count]), refs[count:]
    stream = Stream(shape, tables, sources, buffers, refs[0], refs[1])
    return stream, refs[2:], outs


def _sources(shape: Shape, refs) -> Sources:
    refs = list(refs)
    bank = refs[:2]
    own = refs[2:4] if shape.own else [None, None]
    return Sources(*bank, *own, *(refs[-2:] if shape.int8 else [None, None]))


def to_rows(x: jax.Array, kv: int, blocks) -> jax.Array:
    """[B, T, H, ...] -> [B, K, rows, ...], rows = padded tokens times G, a token's heads together."""
    b, t, h = x.shape[:3]
    padding = -t % blocks.tokens
    x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(b, t + padding, kv, h // kv, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(b, kv, (t + padding) * (h // kv), *x.shape[4:])


def from_rows(x: jax.Array, tokens: int, group: int) -> jax.Array:
    """Inverse of `to_rows`: [B, K, rows, ...] -> [B, T, H, ...]."""
    b, kv, rows = x.shape[:3]
    x = jnp.moveaxis(x.reshape(b, kv, rows // group, group, *x.shape[3:]), 1, 2)
    return x.reshape(b, rows // group, kv * group, *x.shape[4:])[:, :tokens]


class Call(NamedTuple):
    """What the forward and the query-gradient kernel have in common."""

    shape: Shape
    arguments: list  # tables and bias, rows, sources
    prefetched: int
    row_specs: list
    source_specs: list
    scratch: list
    query_spec: pl.BlockSpec
    grid: tuple


def prepare(operands: Operands, blocks, cores: int) -> Call:
    operands = with_bank(operands, blocks)
    shape = tpu_stream.shape_of(operands, blocks, cores)
    b, kv = shape.questions, shape.kv_heads
    prefetched = list(tpu_stream.tables(operands))
    if shape.bias:
        prefetched.append(operands.bias.astype(jnp.float32).reshape(-1))
    row = jnp.arange(blocks.rows, dtype=jnp.int32)[:, None]
    rows = [to_rows(operands.q, kv, blocks), row // blocks.group, row % blocks.group]
    per_core = shape.steps // shape.cores

    def question(core, step, *_):
        return (core * per_core + step) // shape.steps_per_question

    def block(core, step, *_):
        return (core * per_core + step) % shape.steps_per_question

    query_spec = pl.BlockSpec((1, kv, blocks.rows, shape.head_dim), lambda *i: (question(*i), 0, block(*i), 0))
    column = pl.BlockSpec((blocks.rows, 1), lambda *i: (0, 0))
    row_specs = [query_spec, column, column]
    sources = [operands.bank_k, operands.bank_v]
    if shape.own:
        padding = ((0, 0), (0, shape.own_padded - shape.own))
        own_blocks = shape.own_padded // blocks.own
        rows.append(jnp.pad(operands.mask, padding).astype(jnp.int32).reshape(b, own_blocks, blocks.own))
        row_specs.append(pl.BlockSpec((1, own_blocks, blocks.own), lambda *i: (question(*i), 0, 0)))
        sources += [
            jnp.pad(x, (*padding, (0, 0), (0, 0))).reshape(b * shape.own_padded, kv, shape.head_dim)
            for x in (operands.k, operands.v)
        ]
    if shape.int8:
        missing = max(tpu_chip.lanes(shape.scales), shape.scale_window) - shape.scales
        for scale in (operands.bank_k_scale, operands.bank_v_scale):
            sources.append(jnp.pad(scale.reshape(-1, kv, shape.scales), ((0, 0), (0, 0), (0, missing))))
    return Call(
        shape=shape,
        arguments=[*prefetched, *rows, *sources],
        prefetched=len(prefetched),
        row_specs=row_specs,
        source_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(sources),
        scratch=tpu_stream.scratch(shape, operands),
        query_spec=query_spec,
        grid=(shape.cores, per_core),
    )


def with_bank(operands: Operands, blocks) -> Operands:
    """Operands whose bank has at least one block of chunks: the only banks that are copied are smaller."""
    b, num_chunks = operands.q.shape[0], operands.bank_k.shape[0]
    if operands.starts.shape[1] == 0:
        none = jnp.zeros((b, 1), jnp.int32)
        operands = operands._replace(starts=none, lengths=none, bias=None)
    missing = max(0, blocks.chunks - num_chunks)
    grow = lambda x: jnp.pad(x, ((0, missing), (0, 0), (0, 0)))  # noqa: E731
    return operands._replace(bank_k=grow(operands.bank_k), bank_v=grow(operands.bank_v))


@functools.partial(jax.jit, static_argnames=("blocks", "cores"))
def forward(operands: Operands, *, blocks, cores: int):
    """Out and lse of `reference.forward`."""
    call = prepare(operands, blocks, cores)
    shape, kv = call.shape, call.shape.kv_heads
    rows_total = shape.steps_per_question * blocks.rows
    lse_spec = pl.BlockSpec((1, blocks.rows, kv), lambda *i: (call.query_spec.index_map(*i)[0], i_block(call, i), 0))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=call.prefetched,
            grid=call.grid,
            in_specs=[*call.row_specs, *call.source_specs],
            out_specs=[call.query_spec, lse_spec],
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
        compiler_params=params("parallel", "arbitrary"),
        name="gather_attention_forward",
    )(*call.arguments)
    group = blocks.group
    return from_rows(out, shape.tokens, group), from_rows(lse.swapaxes(1, 2), shape.tokens, group)


def i_block(call: Call, index):
    return call.query_spec.index_map(*index)[2]


def params(*semantics: str):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=tpu_chip.vmem_budget())
