"""Gradients of keys and values, of the bank or of the own tokens: every block owns rows of the result.

A block has up to 128 chunks (or own tokens) of one key/value head. It goes through the ranges that touch them, in a
fixed order, and through the query rows of each range's question; it adds up in registers and writes once. So there
are no atomics, ranges may overlap, and two runs agree bit by bit.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.gather_attention import gpu_tiles
from pallas_kernels.gather_attention.gpu_config import COLUMNS, WARPGROUP_ROWS, OwnerSizes, pieces
from pallas_kernels.gather_attention.gpu_forward import LOG2E


@dataclasses.dataclass(frozen=True)
class Owners:
    """The static facts of a launch."""

    sizes: OwnerSizes
    own: int | None  # S if the rows are own tokens, None for a bank
    tokens: int  # T
    group: int  # G
    head_dim: int
    dtype: object
    out_dtype: object  # of keys and values and of their gradients
    biased: bool
    ranges: int  # B * k

    @property
    def pieces(self) -> int:
        return pieces(self.dtype)

    @property
    def copies(self) -> int:
        """Copies of a stage."""
        return 2 * self.pieces + 2 + self.biased

    @property
    def raw(self) -> bool:
        """Whether rows are not bfloat16 as a product takes them: then a buffer in their own dtype is needed."""
        return self.pieces > 1 or self.out_dtype != jnp.bfloat16


def candidates(starts, lengths, num_chunks: int, rows: int):
    """Which ranges may touch which block of `rows` chunks, without a list per block.

    Sorted by start, the ranges that begin before a block's end are the first few; those of them before the first
    one up to which some range reaches into the block do not touch it.

    Returns:
      items [4 * B * k] int32: starts, ends, questions, documents of the sorted ranges; nothing where empty.
      bounds [2 * blocks] int32: the first and the one past the last range that may touch each block.
    """
    b, k = starts.shape
    exists = lengths.reshape(-1) > 0
    starts = jnp.where(exists, starts.reshape(-1), num_chunks)
    ends = jnp.where(exists, starts + lengths.reshape(-1), 0)
    order = jnp.argsort(starts)
    starts, ends = starts[order], ends[order]
    items = jnp.concatenate([starts, ends, order // k, order % k]).astype(jnp.int32)
    first = jnp.arange(-(-num_chunks // rows), dtype=jnp.int32) * rows
    low = jnp.searchsorted(jax.lax.cummax(ends), first, side="right")
    high = jnp.searchsorted(starts, jnp.minimum(first + rows, num_chunks), side="left")
    return items, jnp.concatenate([low, high]).astype(jnp.int32)


def _walk(case, gmem, block, first, rows, body, carry):
    """Fold `body(step, question, document, low, high, row, carry)` over the query rows of the ranges of a block.

    `low`, `high` are the range relative to the block, `row` the first of 64 query rows.
    """

    def range_of(r):
        if case.own is not None:
            return -first, case.own - first, r, 0
        low, high, question, document = (gmem["items"][i * case.ranges + r] for i in range(4))
        return low - first, high - first, question, document

    def over(r, carry):
        low, high, question, document = range_of(r)
        before = 0
        if case.own is not None:  # tokens before the block's first one do not see it
            before = jnp.maximum(first - (case.own - case.tokens), 0) * case.group // COLUMNS
        touches = (low < case.sizes.rows) & (high > 0)
        end = jnp.where(touches, rows // COLUMNS, before)

        def tile(i, carry):
            step, *rest = carry
            rest = body(step, question, document, low, high, i * COLUMNS, rest)
            return step + 1, *rest

        return jax.lax.fori_loop(before, end, tile, carry)

    if case.own is not None:
        return over(block, (jnp.int32(0), *carry))
    low, high = gmem["bounds"][block], gmem["bounds"][gmem["bounds"].shape[0] // 2 + block]
    return jax.lax.fori_loop(low, high, over, (jnp.int32(0), *carry))


def kernel(case, gmem, grad_k_ref, grad_v_ref, smem):
    """Body: the gradients [C, K, D], or [B, S', K, D] of own tokens, S' up to a whole number of blocks."""
    wg, head = jax.lax.axis_index("wg"), jax.lax.axis_index("head")
    tile, question = jax.lax.axis_index("tile"), jax.lax.axis_index("question")
    sizes, own = case.sizes, case.own is not None
    rows = gmem["q"].shape[3]
    first = tile * sizes.rows
    walked = dict(first=first, rows=rows, block=question if own else tile)
    consumer_registers, producer_registers = sizes.registers

    @pl.when(wg == sizes.consumers)
    def _():
        plgpu.set_max_registers(producer_registers, action="decrease")

        def load(step, question, document, low, high, row, carry):
            slot = jax.lax.rem(step, sizes.stages)

            @pl.when(step >= sizes.stages)
            def _():
                plgpu.barrier_wait(smem["consumed"].at[slot])

            barrier, part = smem["loaded"].at[slot], pl.ds(pl.multiple_of(row, COLUMNS), COLUMNS)
            for name in ("q", "grad_out"):
                for piece in range(case.pieces):
                    source = gmem[name].at[piece, question, head, part]
                    plgpu.copy_gmem_to_smem(source, smem[name].at[slot, piece], barrier)
            for name in ("lse", "delta"):
                plgpu.copy_gmem_to_smem(gmem[name].at[question, head, part], smem[name].at[slot], barrier)
            if case.biased:
                source = gmem["bias"].at[question, head, document, part]
                plgpu.copy_gmem_to_smem(source, smem["bias"].at[slot], barrier)
            return carry

        (steps,) = _walk(case, gmem, body=load, carry=(), **walked)
        # Every use of a slot is awaited, as the barriers demand of who waits for one of them.
        for slot in range(sizes.stages):
            pl.when(steps > slot)(functools.partial(plgpu.barrier_wait, smem["consumed"].at[slot]))

    @pl.when(wg < sizes.consumers)
    def _():
        plgpu.set_max_registers(consumer_registers, action="increase")
        mine = pl.ds(pl.multiple_of(first + wg * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
        _load_rows(case, gmem, smem, wg, (question, mine, head) if own else (mine, head))
        keys, values = smem["k"].at[wg], smem["v"].at[wg]
        scratch = smem["left"].at[wg] if "left" in smem else None
        shape = (WARPGROUP_ROWS, COLUMNS)

        def add(step, question, document, low, high, row, carry):
            grad_k, grad_v = carry
            slot = jax.lax.rem(step, sizes.stages)
            plgpu.barrier_wait(smem["loaded"].at[slot])
            across = plgpu.Layout.WGMMA.reduce(0)
            lse, delta = (plgpu.load(smem[name].at[slot], layout=across) for name in ("lse", "delta"))
            if case.biased:
                lse = lse - plgpu.load(smem["bias"].at[slot], layout=across) * LOG2E
            place = wg * WARPGROUP_ROWS + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            allowed = (place >= low) & (place < high)
            if own:
                allowed = allowed & (jax.lax.broadcast_in_dim(smem["mask"][wg], shape, [0]) > 0.5)
                token = (row + jax.lax.broadcasted_iota(jnp.int32, shape, 1)) // case.group
                allowed = allowed & (first + place <= token + (case.own - case.tokens))
            logits = gpu_tiles.product(keys, smem["q"].at[slot]) * (case.head_dim**-0.5 * LOG2E)
            weights = jnp.exp2(logits - jax.lax.broadcast_in_dim(lse, shape, [1]))
            weights = jnp.where(allowed, weights, 0.0)
            grad_v = gpu_tiles.accumulate(grad_v, weights, smem["grad_out"].at[slot], scratch)
            grad_weights = gpu_tiles.product(values, smem["grad_out"].at[slot])
            grad_logits = weights * (grad_weights - jax.lax.broadcast_in_dim(delta, shape, [1]))
            grad_logits = jnp.where(weights != 0.0, grad_logits, 0.0)  # 0 times NaN, of a chunk nobody has
            grad_k = gpu_tiles.accumulate(grad_k, grad_logits, smem["q"].at[slot], scratch)
            plgpu.barrier_arrive(smem["consumed"].at[slot])
            return grad_k, grad_v

        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, case.head_dim), jnp.float32), plgpu.Layout.WGMMA)
        _, grad_k, grad_v = _walk(case, gmem, body=add, carry=(zeros, zeros), **walked)
        for grad, name, ref in ((grad_k * case.head_dim**-0.5, "k", grad_k_ref), (grad_v, "v", grad_v_ref)):
            # The rows themselves are no longer needed. What lies past the end is dropped by TMA.
            staged = smem[f"raw_{name}"].at[wg] if case.raw else smem[name].at[wg, 0]
            staged[...] = grad.astype(case.out_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, ref.at[question, mine, head] if own else ref.at[mine, head])
        plgpu.wait_smem_to_gmem(0)


def _load_rows(case, gmem, smem, wg, where):
    """The keys and values of this warpgroup's rows, in pieces, and which own tokens exist."""
    barrier = smem["rows_loaded"].at[wg]
    if case.own is not None:
        question, tokens, _ = where
        plgpu.copy_gmem_to_smem(gmem["mask"].at[question, tokens], smem["mask"].at[wg], barrier)
    convert = case.raw and case.own is None
    for name in ("k", "v"):
        if convert:
            plgpu.copy_gmem_to_smem(gmem[name].at[where], smem[f"raw_{name}"].at[wg], barrier)
            continue
        for piece in range(case.pieces):
            source = gmem[name].at[piece, *where] if case.own is not None else gmem[name].at[where]
            plgpu.copy_gmem_to_smem(source, smem[name].at[wg, piece], barrier)
    plgpu.barrier_wait(barrier)
    if convert:
        for name in ("k", "v"):
            wide = smem[f"raw_{name}"][wg].astype(jnp.float32)
            for piece, value in enumerate(gpu_tiles.split_pieces(wide, case.pieces)):
                smem[name][wg, piece] = value
        plgpu.commit_smem()


def launch(case, gmem):
    """Gradients of gmem["k"], gmem["v"] in their dtype; own tokens: [B, S', K, D] with rows beyond S."""
    sizes, d = case.sizes, case.head_dim
    own = case.own is not None
    blocks = -(-gmem["k"].shape[2 if own else 0] // sizes.rows)
    shape = (gmem["k"].shape[1], blocks * sizes.rows, *gmem["k"].shape[3:]) if own else gmem["k"].shape
    owned = gpu_tiles.swizzled((sizes.consumers, case.pieces, WARPGROUP_ROWS, d), jnp.bfloat16)
    streamed = gpu_tiles.swizzled((sizes.stages, case.pieces, COLUMNS, d), jnp.bfloat16)
    vector = plgpu.SMEM((sizes.stages, COLUMNS), jnp.float32)
    scratch = dict(k=owned, v=owned, q=streamed, grad_out=streamed, lse=vector, delta=vector)
    if case.biased:
        scratch["bias"] = vector
    if case.raw:
        scratch["raw_k"] = scratch["raw_v"] = gpu_tiles.swizzled((sizes.consumers, WARPGROUP_ROWS, d), case.out_dtype)
    if own:
        scratch["mask"] = plgpu.SMEM((sizes.consumers, WARPGROUP_ROWS), jnp.float32)
    scratch |= dict(
        rows_loaded=plgpu.Barrier(num_arrivals=2 * case.pieces + 1 if own else 2, num_barriers=sizes.consumers),
        loaded=plgpu.Barrier(num_arrivals=case.copies, num_barriers=sizes.stages),
        consumed=plgpu.Barrier(num_arrivals=sizes.consumers, num_barriers=sizes.stages),
    )
    scratch |= gpu_tiles.left_scratch(sizes.consumers, case.pieces)
    names = list(gmem)

    def body(*refs, smem):
        kernel(case, dict(zip(names, refs, strict=False)), *refs[len(names) :], smem)

    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(shape, case.out_dtype),) * 2,
        scratch_types=dict(smem=scratch),
        grid=(blocks, gmem["k"].shape[-2], shape[0] if own else 1),
        grid_names=("tile", "head", "question"),
        num_threads=sizes.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*gmem.values())
