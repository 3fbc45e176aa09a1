"""TPU: how the kernels over query rows are called, and how they find their references."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.gather_attention import tpu_stream
from pallas_kernels.gather_attention.reference import Operands
from pallas_kernels.gather_attention.tpu_stream import Shape, Sources, Stream, Tables
from pallas_kernels.gather_attention.tpu_tiles import Rows


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

    def column_spec(self) -> pl.BlockSpec:
        """Of arrays [B, rows, K]: one number a row and key/value head."""
        blocks = self.shape.blocks
        return pl.BlockSpec((1, blocks.rows, self.shape.kv_heads), lambda *i: (self._place(i)[0], self._place(i)[2], 0))

    def step(self, index) -> jax.Array:
        """The step over all questions that grid index `index` stands for."""
        question, _, block, _ = self._place(index)
        return question * self.shape.steps_per_question + block

    def _place(self, index):
        return self.query_spec.index_map(*index)


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


def params(*semantics: str):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=tpu_chip.vmem_budget())


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
