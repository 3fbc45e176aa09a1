"""Two levels: the groups of documents that may hold the best, then exact scores within those groups.

A group's documents follow each other in the bank. Its summary is the centroid of its chunks' keys, and a radius: the
distance of the farthest of them. No document scores above the group's bound (Cauchy-Schwarz)

    max_t q_t . centroid + max_t |q_t| * radius

So whatever scores above the bounds of all groups left unread is found, in its place; if that holds of the k-th
document found, the selection is the exact one.

Centroids are made on the fly, which reads every key once: what is saved are the products with all routing tokens.

Sizes: B questions, T routing tokens, M router width, C chunks, N documents, G groups, k documents selected.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from msa_jax.errors import require
from msa_jax.memory.bank import LayerMemory
from msa_jax.memory.selection import Selection
from msa_jax.routing.candidates import scores_of
from msa_jax.routing.exact import selection_of
from msa_jax.routing.interface import Query
from pallas_kernels import chunk_scores
from pallas_kernels.chunk_scores.api import NO_SCORE


@dataclasses.dataclass(frozen=True)
class TwoLevel:
    """Attributes:
    group: documents of a group.
    groups: groups that are read for a question; at least as many as documents are selected.
    """

    implementation: str | None = None
    group: int = 32
    groups: int = 16

    def __post_init__(self):
        require(
            self.group >= 1 and self.groups >= 1,
            f"retriever two_level: group and groups must be at least 1, got {self.group} and {self.groups}.",
        )

    def bounds(self, query: Query, memory: LayerMemory, visible: jax.Array | None) -> jax.Array:
        """[B, G] float32, at least the score of every document of a group; `NO_SCORE` where there is none to see."""
        layout, keys, scale = memory.layout, memory.routing_keys, memory.key_scale
        # As they are multiplied when a document is scored.
        vectors = (query.vectors.astype(keys.dtype) if scale is None else query.vectors).astype(jnp.float32)
        if memory.index is not None:
            pick = lambda x: jax.lax.dynamic_index_in_dim(x, memory.index, keepdims=False)  # noqa: E731
            keys, scale = jax.tree.map(pick, (keys, scale))
        keys = keys.astype(jnp.float32) if scale is None else keys * scale[:, None]
        count = -(-layout.num_documents // self.group)
        # A chunk of no document is one of no group.
        owner = jnp.where(layout.chunk_documents < layout.num_documents, layout.chunk_documents // self.group, count)
        fold = lambda how, x: how(x, owner, num_segments=count + 1)[:-1]  # noqa: E731
        sizes = fold(jax.ops.segment_sum, jnp.ones(layout.num_chunks))
        centroids = fold(jax.ops.segment_sum, keys) / jnp.maximum(sizes, 1)[:, None]
        away = jnp.sum((keys - jnp.take(centroids, owner, axis=0, mode="clip")) ** 2, axis=1)
        radius = jnp.sqrt(fold(jax.ops.segment_max, away))
        longest = jnp.max(jnp.where(query.route, jnp.linalg.norm(vectors, axis=2), 0), axis=1)
        near = chunk_scores(vectors, centroids, query_mask=query.route, implementation=self.implementation)
        there = (layout.lengths > 0)[None]
        there = there if visible is None else there & visible
        there = jnp.pad(there, ((0, 0), (0, -layout.num_documents % self.group))).reshape(-1, count, self.group)
        there = jnp.any(there, axis=2) & jnp.any(query.route, axis=1)[:, None]
        return jnp.where(there, near + longest[:, None] * radius[None], NO_SCORE)

    def route(self, query: Query, memory: LayerMemory, visible: jax.Array | None, k: int) -> Selection:
        layout = memory.layout
        bounds = jax.lax.stop_gradient(self.bounds(query, memory, visible))
        read = min(max(self.groups, k), bounds.shape[1])
        # In order, so that of equal scores the first document wins.
        groups = jnp.sort(jax.lax.top_k(bounds, read)[1], axis=1)
        documents = (groups[:, :, None] * self.group + jnp.arange(self.group)[None, None]).reshape(groups.shape[0], -1)
        exists, documents = documents < layout.num_documents, jnp.minimum(documents, layout.num_documents - 1)
        if visible is not None:
            exists = exists & jnp.take_along_axis(visible, documents, axis=1)
        scores = jnp.where(exists, scores_of(query, memory, documents), NO_SCORE)
        place = jax.lax.top_k(jax.lax.stop_gradient(scores), min(k, layout.num_documents))[1]
        best, documents = (jnp.take_along_axis(x, place, axis=1) for x in (scores, documents))
        return selection_of(documents, best, layout)
