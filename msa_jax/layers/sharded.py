"""Routing and attention over a memory whose documents are spread over devices (`DocumentLayout.axes`).

Every device scores its own chunks and keeps its own best documents; the candidates of all are compared; the winners'
chunks are attended to where they lie, and the parts are merged by their log-sum-exp. What crosses devices: queries,
scores (k candidates a device), and outputs; never keys or content. Nothing within `jax.shard_map` communicates: its
results are stacked along the devices' axis, so that derivatives are those of plain JAX.

Sizes: S devices that share the memory, otherwise as in `attention`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from msa_jax import routing, tiers
from msa_jax.memory import DocumentLayout, LayerMemory
from pallas_kernels import gather_attention
from pallas_kernels.gather_attention.api import merge


def _mesh(layout: DocumentLayout) -> jax.sharding.AbstractMesh:
    mesh = jax.sharding.get_abstract_mesh()
    missing = [name for name in layout.axes if name not in mesh.axis_names]
    if mesh.empty or missing:
        raise ValueError(
            f"this memory is spread over the mesh axes {', '.join(layout.axes)}, and the mesh in scope has "
            f"{', '.join(mesh.axis_names) or 'none'}: call under jax.set_mesh of the mesh that it was made for."
        )
    ways = math.prod(mesh.shape[name] for name in layout.axes)
    if layout.num_chunks % ways or layout.num_documents % ways:
        raise ValueError(
            f"{layout.num_chunks} chunks and {layout.num_documents} documents cannot be spread over {ways} devices: "
            f"pad both to multiples of {ways}."
        )
    return mesh


def _batch(mesh: jax.sharding.AbstractMesh, layout: DocumentLayout, size: int) -> str | None:
    """The mesh axis of questions, unless documents have it."""
    free = "data" in mesh.axis_names and "data" not in layout.axes
    return "data" if free and size % mesh.shape["data"] == 0 else None


def _heads(mesh: jax.sharding.AbstractMesh, memory: LayerMemory) -> str | None:
    """The mesh axis of heads, unless documents have it or the layer's content is not its own arrays."""
    free = "model" in mesh.axis_names and "model" not in memory.layout.axes and memory.index is None
    return "model" if free and memory.content_k.shape[-2] % mesh.shape["model"] == 0 else None


def _local(layout: DocumentLayout) -> DocumentLayout:
    """A device's part of a layout, numbered from 0."""
    device = jax.lax.axis_index(layout.axes) if layout.axes else 0
    first_chunk, first_document = device * layout.num_chunks, device * layout.num_documents
    return dataclasses.replace(
        layout,
        chunk_documents=jnp.clip(layout.chunk_documents - first_document, 0, layout.num_documents),
        starts=layout.starts - first_chunk,
        axes=None,
    )


def _layout_specs(layout: DocumentLayout) -> DocumentLayout:
    axes = P(layout.axes or None)
    return dataclasses.replace(layout, chunk_documents=axes, starts=axes, lengths=axes)


def route(
    query: jax.Array,
    memory: LayerMemory,
    *,
    route: jax.Array,
    visible: jax.Array | None,
    mean_over_tokens: bool | jax.Array,
    top_k: int,
    method: str,
    recall: float,
    implementation: str | None,
) -> tuple[jax.Array, routing.Selection]:
    """`routing.document_scores` and `routing.select`, each device over its own documents.

    Returns:
      Scores [B, N] float32, spread over devices as the documents are, and the selection, the same as one device's.
    """
    layout = memory.layout
    mesh = _mesh(layout)
    batch, axes = _batch(mesh, layout, query.shape[0]), layout.axes or None
    lead = () if memory.index is None else (None,)

    def local(query, keys, key_scale, index, layout, route, visible, mean_over_tokens):
        mine = _local(layout)
        scores = routing.document_scores(
            query, keys, mine, route=route, visible=visible,
            mean_over_tokens=False if mean_over_tokens is None else mean_over_tokens, key_scale=key_scale,
            layer=index, implementation=implementation,
        )  # fmt: skip
        best = routing.select(scores, mine, top_k=top_k, method=method, recall=recall)
        device = jax.lax.axis_index(layout.axes) if layout.axes else 0
        return scores, dataclasses.replace(
            best,
            documents=best.documents + device * mine.num_documents,
            starts=best.starts + device * mine.num_chunks,
        )

    spread = P(batch, axes)
    scores, candidates = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            P(batch), P(*lead, axes), P(*lead, axes), P(), _layout_specs(layout), P(batch), spread, P(),
        ),
        out_specs=(spread, routing.Selection(documents=spread, scores=spread, starts=spread, lengths=spread)),
        check_vma=False,
    )(
        query, memory.routing_keys, memory.key_scale, memory.index, layout, route, visible,
        None if mean_over_tokens is False else jnp.asarray(mean_over_tokens),
    )  # fmt: skip
    # Devices are in order and candidates of one are best first, so of equal scores the first document wins here too.
    place = jax.lax.top_k(jax.lax.stop_gradient(candidates.scores), min(top_k, layout.num_documents))[1]
    return scores, jax.tree.map(lambda x: jnp.take_along_axis(x, place, axis=1), candidates)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    memory: LayerMemory,
    selection: routing.Selection,
    *,
    bias: jax.Array | None,
    mask: jax.Array | None,
    implementation: str | None,
) -> jax.Array:
    """`gather_attention` [B, T, H, D] over selected documents, each device over those it holds."""
    layout = memory.layout
    mesh = _mesh(layout)
    batch, axes = _batch(mesh, layout, q.shape[0]), layout.axes or None
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    # What attention does not read stays outside.
    memory = dataclasses.replace(memory, routing_keys=None, key_scale=None)

    def local(q, k, v, memory, starts, lengths, bias, mask):
        mine, device = _local(memory.layout), jax.lax.axis_index(layout.axes) if layout.axes else 0
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
    return dataclasses.replace(rest, layout=_layout_specs(memory.layout), **specs)
