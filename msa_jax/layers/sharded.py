"""Attention over a memory whose documents are spread over devices (`DocumentLayout.axes`).

The winners' chunks are attended to where they lie, and the parts are merged by their log-sum-exp. What crosses devices:
queries and outputs, never content. Nothing within `jax.shard_map` communicates: its results are stacked along the
devices' axis, so that derivatives are those of plain JAX.

Sizes: S devices that share the memory, otherwise as in `attention`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from msa_jax.memory import LayerMemory, Selection, tiers
from msa_jax.memory.parts import batch_axis, layout_specs, local_layout, mesh_of
from pallas_kernels import gather_attention
from pallas_kernels.gather_attention.api import merge


def _heads(mesh: jax.sharding.AbstractMesh, memory: LayerMemory) -> str | None:
    """The mesh axis of heads, unless documents have it or the layer's content is not its own arrays."""
    free = "model" in mesh.axis_names and "model" not in memory.layout.axes and memory.index is None
    return "model" if free and memory.content_k.shape[-2] % mesh.shape["model"] == 0 else None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    memory: LayerMemory,
    selection: Selection,
    *,
    bias: jax.Array | None,
    mask: jax.Array | None,
    implementation: str | None,
) -> jax.Array:
    """`gather_attention` [B, T, H, D] over selected documents, each device over those it holds."""
    layout = memory.layout
    mesh = mesh_of(layout)
    batch, axes = batch_axis(mesh, layout, q.shape[0]), layout.axes or None
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    # What attention does not read stays outside.
    memory = dataclasses.replace(memory, routing_keys=None, key_scale=None)

    def local(q, k, v, memory, starts, lengths, bias, mask):
        mine, device = local_layout(memory.layout), jax.lax.axis_index(layout.axes) if layout.axes else 0
        origin = device * mine.num_chunks
        here = (starts >= origin) & (starts < origin + mine.num_chunks)
        content = tiers.content_of(
            dataclasses.replace(memory, layout=mine),
            jnp.where(here, starts - origin, 0),
            jnp.where(here, lengths, 0),
            origin=origin,
        )
        out, lse = gather_attention(
            # The first device has the own tokens.
            q, k, v, **content._asdict(), bias=bias, mask=mask & (device == 0), implementation=implementation,
        )  # fmt: skip
        return out[None], lse[None]

    heads = _heads(mesh, memory)
    by_batch, by_head, parts = P(batch), P(batch, None, heads), P(axes, batch, None, heads)
    out, lse = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            by_head, by_head, by_head, _memory_specs(memory, heads), by_batch, by_batch, by_head, by_batch,
        ),
        out_specs=(parts, parts),
        check_vma=False,
    )(q, k, v, memory, selection.starts, selection.lengths, bias, mask)  # fmt: skip
    return merge(out, lse)[0]


def _memory_specs(memory: LayerMemory, heads: str | None) -> LayerMemory:
    """Of a layer's content, its scales and layout."""
    lead, axes = () if memory.index is None else (None,), memory.layout.axes or None
    specs = dict.fromkeys(("content_k", "content_v"), P(*lead, axes, heads))
    specs |= dict.fromkeys(("content_k_scale", "content_v_scale"), P(*lead, heads, axes))
    specs = {name: spec for name, spec in specs.items() if getattr(memory, name) is not None}
    rest = jax.tree.map(lambda _: P(), dataclasses.replace(memory, layout=None, **dict.fromkeys(specs)))
    return dataclasses.replace(rest, layout=layout_specs(memory.layout), **specs)
