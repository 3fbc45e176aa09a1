"""Exact routing over a memory whose documents are spread over devices (`DocumentLayout.axes`).

Every device scores its own chunks and keeps its own best documents; the candidates of all are compared. What crosses
devices: queries and scores (k candidates a device), never keys. Nothing within `jax.shard_map` communicates: its
results are stacked along the devices' axis, so that derivatives are those of plain JAX.

Sizes: S devices that share the memory, otherwise as in `exact`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from msa_jax.memory.bank import LayerMemory
from msa_jax.memory.parts import batch_axis, layout_specs, local_layout, mesh_of
from msa_jax.memory.selection import Selection
from msa_jax.routing import exact


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
) -> tuple[jax.Array, Selection]:
    """`exact.document_scores` and `exact.select`, each device over its own documents.

    Returns:
      Scores [B, N] float32, spread over devices as the documents are, and the selection, the same as one device's.
    """
    layout = memory.layout
    mesh = mesh_of(layout)
    batch, axes = batch_axis(mesh, layout, query.shape[0]), layout.axes or None
    lead = () if memory.index is None else (None,)

    def local(query, keys, key_scale, index, layout, route, visible, mean_over_tokens):
        mine = local_layout(layout)
        scores = exact.document_scores(
            query, keys, mine, route=route, visible=visible,
            mean_over_tokens=False if mean_over_tokens is None else mean_over_tokens, key_scale=key_scale,
            layer=index, implementation=implementation,
        )  # fmt: skip
        best = exact.select(scores, mine, top_k=top_k, method=method, recall=recall)
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
            P(batch), P(*lead, axes), P(*lead, axes), P(), layout_specs(layout), P(batch), spread, P(),
        ),
        out_specs=(spread, Selection(documents=spread, scores=spread, starts=spread, lengths=spread)),
        check_vma=False,
    )(
        query, memory.routing_keys, memory.key_scale, memory.index, layout, route, visible,
        None if mean_over_tokens is False else jnp.asarray(mean_over_tokens),
    )  # fmt: skip
    # Devices are in order and candidates of one are best first, so of equal scores the first document wins here too.
    place = jax.lax.top_k(jax.lax.stop_gradient(candidates.scores), min(top_k, layout.num_documents))[1]
    return scores, jax.tree.map(lambda x: jnp.take_along_axis(x, place, axis=1), candidates)
