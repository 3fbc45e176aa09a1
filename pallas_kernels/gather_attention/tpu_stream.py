"""TPU: chunks and own tokens of one question after another, read where they lie, one block ahead of the work.

A step is one block of queries of one question. The copies run across documents and across steps, so that the
memory system never waits for a question to end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gather_attention.config import Blocks
from pallas_kernels.gather_attention.reference import Operands
from pallas_kernels.tpu_chip import LANES


class Tables(NamedTuple):
    """Scalars that steer the copies, flat int32 in SMEM: documents with a chunk come first, in their order."""

    counts: jax.Array  # [B] documents that have a chunk
    starts: jax.Array  # [B * k]
    lengths: jax.Array  # [B * k]
    documents: jax.Array  # [B * k] which of the k documents it is
    layer: jax.Array  # [1] whose scales apply


def tables(operands: Operands) -> Tables:
    """Tables of the ranges, `starts` and `lengths` [B, k]."""
    starts, lengths = operands.starts, operands.lengths
    order = jnp.argsort(lengths <= 0, axis=1, stable=True).astype(jnp.int32)
    take = lambda x: jnp.take_along_axis(x, order, axis=1).reshape(-1)  # noqa: E731
    counts = jnp.sum(lengths > 0, axis=1, dtype=jnp.int32)
    layer = jnp.zeros(1, jnp.int32) if operands.layer is None else operands.layer[None]
    return Tables(counts, take(starts), take(lengths), order.reshape(-1), layer)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of a call."""

    selected: int  # k
    num_chunks: int  # C, at least blocks.chunks
    kv_heads: int  # K
    head_dim: int  # D
    tokens: int  # T
    own: int  # S
    steps_per_question: int
    questions: int  # B
    cores: int  # that share the steps
    scales: int  # chunks of a layer of an int8 bank, else 0
    bias: bool
    blocks: Blocks

    @property
    def int8(self) -> bool:
        return self.scales > 0

    @property
    def own_padded(self) -> int:
        return -(-self.own // self.blocks.own) * self.blocks.own

    @property
    def steps(self) -> int:
        return self.questions * self.steps_per_question

    @property
    def scale_window(self) -> int:
        """Scales are read from a multiple of 128 on, so a window holds up to 127 more than the chunks."""
        return -(-self.blocks.chunks // LANES) * LANES + LANES


def shape_of(operands: Operands, blocks: Blocks, cores: int) -> Shape:
    b, t, _, d = operands.q.shape
    steps = -(-t // blocks.tokens)
    return Shape(
        selected=operands.starts.shape[1],
        num_chunks=operands.bank_k.shape[0],
        kv_heads=operands.k.shape[2],
        head_dim=d,
        tokens=t,
        own=operands.k.shape[1],
        steps_per_question=steps,
        questions=b,
        cores=cores if b * steps % cores == 0 else 1,
        scales=0 if operands.bank_k_scale is None else operands.bank_k_scale.shape[-1],
        bias=operands.bias is not None,
        blocks=blocks,
    )


class Sources(NamedTuple):
    """Where the blocks lie, in HBM: [C, K, D] bank, [B * S, K, D] own tokens, [L, K, C / L] scales."""

    bank_k: jax.Array
    bank_v: jax.Array
    own_k: jax.Array | None
    own_v: jax.Array | None
    scale_k: jax.Array | None
    scale_v: jax.Array | None


def scratch(shape: Shape, operands: Operands) -> list:
    """Two buffers of each source, their semaphores, and the number of blocks read so far."""
    blocks, bank = shape.blocks, operands.bank_k.dtype
    rest = (shape.kv_heads, shape.head_dim)
    buffers = [pltpu.VMEM((2, blocks.chunks, *rest), bank)] * 2
    if shape.own:
        buffers += [pltpu.VMEM((2, blocks.own, *rest), operands.k.dtype)] * 2
    if shape.int8:
        buffers += [pltpu.VMEM((2, shape.kv_heads, shape.scale_window), jnp.float32)] * 2
    return [*buffers, pltpu.SemaphoreType.DMA((2, 4)), pltpu.SMEM((1,), jnp.int32)]


@dataclasses.dataclass(frozen=True)
class Stream:
    """The copies of a kernel; `refs` are Sources and the refs of `scratch`."""

    shape: Shape
    tables: Tables
    sources: Sources
    buffers: Sources
    semaphores: jax.Array
    read: jax.Array

    def step(self):
        """Index of the current step over all questions and cores."""
        per_core = self.shape.steps // self.shape.cores
        return pl.program_id(0) * per_core + pl.program_id(1)

    def chunk_start(self, question, j, o):
        """First chunk of block `o` of document `j`, and the first chunk read: a copy never leaves the bank."""
        wanted = self.tables.starts[question * self.shape.selected + j] + o * self.shape.blocks.chunks
        return wanted, jnp.minimum(wanted, self.shape.num_chunks - self.shape.blocks.chunks)

    def _bank_copies(self, question, j, o, slot):
        _, start = self.chunk_start(question, j, o)
        rows = pl.ds(start, self.shape.blocks.chunks)
        pairs = [
            (self.sources.bank_k.at[rows], self.buffers.bank_k),
            (self.sources.bank_v.at[rows], self.buffers.bank_v),
        ]
        if self.shape.int8:
            layer, window = self.tables.layer[0], pl.ds(self.scale_start(start)[0], self.shape.scale_window)
            pairs += [
                (self.sources.scale_k.at[layer, :, window], self.buffers.scale_k),
                (self.sources.scale_v.at[layer, :, window], self.buffers.scale_v),
            ]
        return self._copies(pairs, slot)

    def scale_start(self, start):
        """First chunk of the layer whose scale is read with chunk `start`, and how many chunks before it.

        Negative where a copy that may not leave the bank begins before the layer.
        """
        within = start - self.tables.layer[0] * self.shape.scales
        last = self.sources.scale_k.shape[2] - self.shape.scale_window
        first = pl.multiple_of(jnp.clip(within // LANES * LANES, 0, last), LANES)
        return first, within - first

    def _own_copies(self, question, o, slot):
        rows = pl.ds(question * self.shape.own_padded + o * self.shape.blocks.own, self.shape.blocks.own)
        pairs = [
            (self.sources.own_k.at[rows], self.buffers.own_k),
            (self.sources.own_v.at[rows], self.buffers.own_v),
        ]
        return self._copies(pairs, slot)

    def _copies(self, pairs, slot):
        return [
            pltpu.make_async_copy(source, buffer.at[slot], self.semaphores.at[slot, i])
            for i, (source, buffer) in enumerate(pairs)
        ]

    def own_blocks(self, step):
        """Blocks of own tokens that the last query of the step may see."""
        seen = (step % self.shape.steps_per_question + 1) * self.shape.blocks.tokens
        last = jnp.minimum(seen + self.shape.own - self.shape.tokens, self.shape.own)
        return pl.cdiv(last, self.shape.blocks.own)

    def _fetch_first(self, step, slot):
        question = step // self.shape.steps_per_question
        has_bank = self.tables.counts[question] > 0
        pl.when(has_bank)(lambda: _start(self._bank_copies(question, 0, 0, slot)))
        if self.shape.own:
            pl.when(~has_bank)(lambda: _start(self._own_copies(question, 0, slot)))

    def run(self, visit_bank: Callable, visit_own: Callable) -> None:
        """Call `visit_bank(question, j, o, slot)` and `visit_own(step, o, slot)` on every block of this step.

        Each is called with its block in buffer `slot`, while the next block is on its way.
        """
        shape, counts = self.shape, self.tables.counts
        step = self.step()
        question = step // shape.steps_per_question
        first_of_core = pl.program_id(1) == 0
        previous = jnp.maximum(step - 1, 0) // shape.steps_per_question
        # A step without a block fetches nothing for the next one either.
        idle = jnp.logical_and(counts[previous] == 0, shape.own == 0)
        read = jnp.where(first_of_core, 0, self.read[0])
        pl.when(jnp.logical_or(first_of_core, idle))(lambda: self._fetch_first(step, read % 2))
        last_of_core = pl.program_id(1) == shape.steps // shape.cores - 1

        def fetch_next_step(slot):
            pl.when(~last_of_core)(lambda: self._fetch_first(step + 1, slot))

        def document(j, read):
            blocks = pl.cdiv(self.tables.lengths[question * shape.selected + j], shape.blocks.chunks)

            def block(o, read):
                slot, following = read % 2, (read + 1) % 2
                more = o + 1 < blocks
                other = jnp.logical_and(~more, j + 1 < counts[question])
                next_j, next_o = jnp.where(more, j, j + 1), jnp.where(more, o + 1, 0)
                pl.when(jnp.logical_or(more, other))(
                    lambda: _start(self._bank_copies(question, next_j, next_o, following))
                )

                @pl.when(jnp.logical_and(~more, j + 1 == counts[question]))
                def _():
                    if shape.own:
                        _start(self._own_copies(question, 0, following))
                    else:
                        fetch_next_step(following)

                for copy in self._bank_copies(question, j, o, slot):
                    copy.wait()
                visit_bank(question, j, o, slot)
                return read + 1

            return jax.lax.fori_loop(0, blocks, block, read)

        read = jax.lax.fori_loop(0, counts[question], document, read)
        if shape.own:
            blocks = self.own_blocks(step)

            def own(o, read):
                slot, following = read % 2, (read + 1) % 2
                more = o + 1 < blocks
                pl.when(more)(lambda: _start(self._own_copies(question, o + 1, following)))
                pl.when(~more)(lambda: fetch_next_step(following))
                for copy in self._own_copies(question, o, slot):
                    copy.wait()
                visit_own(step, o, slot)
                return read + 1

            read = jax.lax.fori_loop(0, blocks, own, read)
        self.read[0] = read


def _start(copies):
    for copy in copies:
        copy.start()
