"""`chunk_scores` for Hopper GPUs, in Pallas Mosaic GPU: one pass over the keys, a max over tokens in registers.

One memory warpgroup a block fills a ring of shared-memory stages with tiles of keys (tensor copy engine); two
more take them to registers, dequantise them there and multiply them with the query on the tensor cores (wgmma).
Blocks are persistent: each takes every n-th tile, and the ring never drains between tiles. Keys pass through
registers because rows of shared memory that wgmma reads itself must come in eights, and C need not divide by 8.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chunk_scores import gpu_backward, gpu_config, gpu_max, gpu_terms, reference

NO_SCORE = reference.NO_SCORE
backward = gpu_backward.backward


def unsupported(*, query, keys) -> str | None:
    """Why the kernel cannot run a case, or None; judged from shapes, dtypes and the device traced for."""
    return gpu_config.unsupported(query, keys)


@functools.partial(jax.jit, static_argnames="winners")
def forward(query, keys, query_mask, query_scale, key_scale, layer=None, *, winners):
    """Scores [B, C] float32 and the token that won each chunk, [B, C] int32 or None; as `reference.forward`."""
    b, t, _ = query.shape
    if 0 in (b, t, keys.shape[-2]):
        return reference.forward(query, keys, query_mask, query_scale, key_scale, layer, winners=winners)
    if layer is None:
        keys, layer = keys[None], jnp.zeros((), jnp.int32)
    elif key_scale is not None:
        key_scale = key_scale[layer]
    if query.dtype not in (jnp.int8, jnp.bfloat16):
        query = query.astype(jnp.float32)
    cut = gpu_config.plan(query, keys, winners)
    # Columns beyond the tokens and the questions there are, and tokens that do not route, never win.
    floor = _columns(jnp.where(query_mask, 0.0, NO_SCORE)[..., None], cut, NO_SCORE)[..., 0]
    scale = None if query_scale is None else _columns(query_scale.astype(jnp.float32)[..., None], cut, 0)[..., 0]
    out = _call(cut, _query_blocks(query, cut), keys, layer[None], floor, scale, winners)
    scores, *won = (x[:b, : keys.shape[1]] for x in out)
    # A key with a NaN has no winner.
    return reference.scale_scores(scores, key_scale), jnp.clip(won[0], 0, t - 1) if winners else None


def _columns(x, cut, fill):
    """[B, T, ...] in the order of accumulator columns: [groups * blocks, columns, ...]."""
    short = (cut.groups * cut.questions - x.shape[0], cut.blocks * cut.tokens - x.shape[1])
    x = jnp.pad(x, [(0, short[0]), (0, short[1]), (0, 0)], constant_values=fill)
    x = x.reshape(cut.groups, cut.questions, cut.blocks, cut.tokens, -1)
    x = x.transpose((0, 2, 3, 1, 4) if cut.by_token else (0, 2, 1, 3, 4))
    return x.reshape(cut.groups * cut.blocks, cut.columns, -1)


def _query_blocks(query, cut):
    """[strips, groups * blocks, pieces * columns, sub]: what one copy to shared memory takes is contiguous."""
    width = cut.steps * cut.copies * cut.strip
    query = _columns(jnp.pad(query, [(0, 0), (0, 0), (0, width - query.shape[2])]), cut, 0)
    terms = jnp.concatenate(gpu_terms.split(query) if cut.pieces == 3 else [query], axis=1)
    units, rows, _ = terms.shape
    return terms.reshape(units, rows, width // cut.sub, cut.sub).transpose(2, 0, 1, 3)


def _call(cut, query, keys, layer, floor, scale, winners):
    """Scores, and winners if asked for: [groups * questions, C to a multiple of 4]."""
    num_chunks = keys.shape[1]
    tile = gpu_config.WARPGROUPS * cut.rows
    tiles = pl.cdiv(num_chunks, tile)
    grid = min(gpu_config.multiprocessors(), tiles)
    # What the copy engine writes starts at multiples of 16 bytes; no wider tiles, lest C be padded further.
    out = (cut.groups * cut.questions, pl.cdiv(num_chunks, 4) * 4)
    out_shape = (gpu_config.WARPGROUPS, cut.questions, cut.rows)
    out_transforms = (plgpu.TilingTransform((8, 4)),) if cut.by_token else ()
    out_type = [jax.ShapeDtypeStruct(out, dtype) for dtype in (jnp.float32, jnp.int32)[: 1 + winners]]
    strips, units, query_rows, sub = query.shape
    per_step = strips // cut.steps
    copies = cut.copies + (0 if cut.resident else per_step)
    query_shape = (strips, units) if cut.resident else (cut.stages, per_step)
    # One row of keys a tile of the layout: then a bank of any size can be copied, and the bytes are the same.
    ring_layout = gpu_terms.swizzled(1, cut.strip, keys.dtype)
    query_layout = gpu_terms.swizzled(8, sub, query.dtype)
    scratch = dict(
        ring=plgpu.SMEM((cut.stages, cut.copies, tile, cut.strip), keys.dtype, transforms=ring_layout),
        query_smem=plgpu.SMEM((*query_shape, query_rows, sub), query.dtype, transforms=query_layout),
        out_smem=[plgpu.SMEM(out_shape, t.dtype, transforms=out_transforms) for t in out_type],
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=cut.stages),
        empty=plgpu.Barrier(num_arrivals=gpu_config.WARPGROUPS, num_barriers=cut.stages),
        query_here=plgpu.Barrier(num_arrivals=strips * units if cut.resident else 1),
        operand=gpu_terms.operand((gpu_config.WARPGROUPS, cut.rows, sub), query.dtype),
    )
    kernel = plgpu.kernel(
        functools.partial(_kernel, cut=cut, tiles=tiles, grid=grid, scaled=scale is not None),
        out_type=out_type,
        scratch_types=scratch,
        grid=(grid,),
        grid_names=("block",),
        num_threads=gpu_config.WARPGROUPS + 1,
        thread_name="warpgroup",
    )
    return kernel(keys, layer, query, floor, *(() if scale is None else (scale,)))


def _kernel(
    keys,
    layer,
    query,
    floor,
    *refs,
    cut,
    tiles,
    grid,
    scaled,
    ring,
    query_smem,
    out_smem,
    full,
    empty,
    query_here,
    operand,
):
    scale, outs = (refs[0], refs[1:]) if scaled else (None, refs)
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    strips, units = query.shape[:2]
    per_step = strips // cut.steps
    # Work of this block: its tiles, for each all column blocks, for each all steps along M.
    mine = lax.div(tiles - block + grid - 1, grid)
    tile = gpu_config.WARPGROUPS * cut.rows

    @pl.when(warpgroup == gpu_config.WARPGROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        if cut.resident:

            @pl.loop(0, strips)
            def _(s):
                for unit in range(units):
                    plgpu.copy_gmem_to_smem(query.at[s, unit], query_smem.at[s, unit], query_here)

        total, chosen = mine * units * cut.steps, layer[0]

        @pl.loop(0, total)
        def _(i):
            slot, step = lax.rem(i, cut.stages), lax.rem(i, cut.steps)
            start = (block + lax.div(i, units * cut.steps) * grid) * tile

            @pl.when(i >= cut.stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            for j in range(cut.copies):
                column = (step * cut.copies + j) * cut.strip
                source = keys.at[chosen, pl.ds(start, tile), pl.ds(column, cut.strip)]
                plgpu.copy_gmem_to_smem(source, ring.at[slot, j], full.at[slot])
            if not cut.resident:
                unit = lax.rem(lax.div(i, cut.steps), units)
                for j in range(per_step):
                    source = query.at[step * per_step + j, unit]
                    plgpu.copy_gmem_to_smem(source, query_smem.at[slot, j], full.at[slot])

        # Leave no arrival unseen.
        @pl.loop(lax.max(total - cut.stages, 0), total)
        def _(i):
            plgpu.barrier_wait(empty.at[lax.rem(i, cut.stages)])

    @pl.when(warpgroup < gpu_config.WARPGROUPS)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        through = None if operand is None else operand.at[warpgroup]
        if cut.resident:
            plgpu.barrier_wait(query_here)

        def products(first, unit):
            """[rows, columns]: this warpgroup's rows of the tile whose steps in the ring start at `first`."""

            def accumulate(acc):
                @pl.loop(0, cut.steps)
                def _(step):
                    slot = lax.rem(first + step, cut.stages)
                    plgpu.barrier_wait(full.at[slot])
                    for j in range(cut.copies):
                        part = plgpu.load(ring.at[slot, j, pl.ds(warpgroup * cut.rows, cut.rows)])
                        for k in range(cut.strip // cut.sub):
                            s = j * (cut.strip // cut.sub) + k
                            where = (step * per_step + s, unit) if cut.resident else (slot, s)
                            left = gpu_terms.terms_of(part[:, k * cut.sub : (k + 1) * cut.sub], query.dtype)
                            terms = [pl.ds(n * cut.columns, cut.columns) for n in range(cut.pieces)]
                            right = [query_smem.at[(*where, columns)].T for columns in terms]
                            gpu_terms.multiply_add(acc, left, right, through)
                    plgpu.commit_smem()  # threads have read what the copy engine may now overwrite
                    plgpu.barrier_arrive(empty.at[slot])

                return acc[...]

            dtype = jnp.int32 if query.dtype == jnp.int8 else jnp.float32
            return pl.run_scoped(accumulate, plgpu.ACC((cut.rows, cut.columns), dtype)).astype(jnp.float32)

        @pl.loop(0, mine * cut.groups)
        def _(i):
            group = lax.rem(i, cut.groups)

            def block_of_tokens(n, best):
                unit = group * cut.blocks + n
                acc = products((i * cut.blocks + n) * cut.steps, unit)
                if scaled:
                    acc = acc * gpu_max.of_columns(scale.at[unit], cut)
                acc = jnp.where(gpu_max.of_columns(floor.at[unit], cut) == 0.0, acc, NO_SCORE)
                return gpu_max.fold(best, acc, n * cut.tokens, cut)

            best = lax.fori_loop(0, cut.blocks, block_of_tokens, gpu_max.nothing(cut, len(outs) == 2))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            start = (block + lax.div(i, cut.groups) * grid) * tile + warpgroup * cut.rows
            for q, results in enumerate(best):
                for result, smem in zip(results, out_smem, strict=True):
                    if cut.by_token:
                        smem.at[warpgroup].T[...] = plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED)
                    else:
                        smem[warpgroup, q] = result
            plgpu.commit_smem()
            for smem, out in zip(out_smem, outs, strict=True):
                rows = pl.ds(group * cut.questions, cut.questions)
                plgpu.copy_smem_to_gmem(smem.at[warpgroup], out.at[rows, pl.ds(start, cut.rows)])

        plgpu.wait_smem_to_gmem(0)
