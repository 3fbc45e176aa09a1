"""Routing over a memory whose documents are spread over devices (`DocumentLayout.axes`).

Every device routes over its own documents; the candidates of all are compared. What crosses devices: queries and
scores (k candidates a device), never keys. Nothing within `jax.shard_map` communicates: its results are stacked along
the devices' axis, so that derivatives are those of plain JAX.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from msa_jax.memory.bank import LayerMemory
from msa_jax.memory.parts import batch_axis, layout_specs, local_layout, mesh_of
from msa_jax.memory.selection import Selection
from msa_jax.routing.interface import Query, Retriever


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A retriever of each device's own documents, as one of all documents: what is exact there is exact here."""

    local: Retriever

    def route(self, query: Query, memory: LayerMemory, visible: jax.Array | None, k: int) -> Selection:
        one = lambda *args: (None, self.local.route(*args))  # noqa: E731
        return self._spread(one, query, memory, visible, k)[1]

    def route_with_scores(
        self, query: Query, memory: LayerMemory, visible: jax.Array | None, k: int
    ) -> tuple[jax.Array, Selection]:
        """As the local retriever's; scores [B, N] are spread over devices as the documents are."""
        return self._spread(self.local.route_with_scores, query, memory, visible, k)

    def _spread(self, route, query, memory, visible, k):
        layout = memory.layout
        mesh = mesh_of(layout)
        batch, axes = batch_axis(mesh, layout, query.vectors.shape[0]), layout.axes or None
        lead = () if memory.index is None else (None,)

        def local(query, keys, key_scale, index, layout, visible):
            mine = local_layout(layout)
            scores, best = route(query, LayerMemory(keys, None, None, mine, index, key_scale), visible, k)
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
            in_specs=(P(batch), P(*lead, axes), P(*lead, axes), P(), layout_specs(layout), spread),
            out_specs=(spread, Selection(documents=spread, scores=spread, starts=spread, lengths=spread)),
            check_vma=False,
        )(query, memory.routing_keys, memory.key_scale, memory.index, layout, visible)
        # Devices are in order and candidates of one best first, so of equal scores the first document wins here too.
        place = jax.lax.top_k(jax.lax.stop_gradient(candidates.scores), min(k, layout.num_documents))[1]
        return scores, jax.tree.map(lambda x: jnp.take_along_axis(x, place, axis=1), candidates)
