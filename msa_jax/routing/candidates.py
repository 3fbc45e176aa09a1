"""Scores of documents that are named, not of all; and what is told of the best documents of all router layers.

Sizes: B questions, T routing tokens, M router width, C chunks, N documents, m documents named, L_r router layers,
k documents selected, R documents reported.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from msa_jax.memory.bank import LayerMemory, MemoryBank
from msa_jax.memory.selection import Selection
from msa_jax.routing.exact import top_k_indices
from msa_jax.routing.interface import Query
from pallas_kernels.chunk_scores.api import NO_SCORE


def scores_of(query: Query, memory: LayerMemory, documents: jax.Array) -> jax.Array:
    """Scores [B, m] float32 of documents [B, m] int32, `NO_SCORE` of those that are absent.

    Only their keys are read, one question's at a time. The same scores as the exact retriever's, but for rounding.
    """
    layout, keys, scale = memory.layout, memory.routing_keys, memory.key_scale
    which = () if memory.index is None else (memory.index,)

    def one(question):
        vectors, route, documents = question
        starts, lengths = jnp.asarray(layout.starts)[documents], jnp.asarray(layout.lengths)[documents]
        offsets = jnp.arange(layout.max_length)[None]
        chunks = jnp.minimum(starts[:, None] + offsets, layout.num_chunks - 1)  # [m, longest]
        read = keys.at[(*which, chunks)].get(mode="promise_in_bounds")
        vectors, read = (vectors.astype(keys.dtype), read) if scale is None else (vectors, read.astype(vectors.dtype))
        products = jnp.einsum("tm,dcm->dct", vectors, read, preferred_element_type=jnp.float32)
        best = jnp.max(jnp.where(route[None, None], products, NO_SCORE), axis=2, initial=NO_SCORE)
        if scale is not None:
            best = best * scale.at[(*which, chunks)].get(mode="promise_in_bounds")
        there = (offsets < lengths[:, None]) & jnp.any(route)
        return jnp.max(jnp.where(there, best, NO_SCORE), axis=1, initial=NO_SCORE)

    return jax.lax.map(one, (query.vectors, query.route, documents))


def best_of_layers(
    selection: Selection,
    bank: MemoryBank,
    *,
    scores: jax.Array | None,
    query: Query,
    visible: jax.Array | None,
    also: Selection | None,
    reported: int,
) -> tuple[jax.Array, jax.Array]:
    """Best documents [L_r, B, R] of each router layer, and the scores of all of them in each, [L_r, B, L_r * R].

    Args:
      selection: [L_r, B, k] fields, what each layer reads.
      bank: that was asked.
      scores: [L_r, B, N], of a retriever that has them; None: they are computed of the documents told of alone.
      query: of [L_r, B, T, M] vectors and [B, T] tokens that route; not used with `scores`.
      visible: [B, N] bool.
      also: [L_r, B, k] fields, what tokens before these selected, as in `MSATransformer`.
      reported: R. More than k are told of only with `scores`, on one device, and without `also`.
    """
    documents = selection.documents[:, :, :reported]
    layers, b = documents.shape[:2]
    some = min(reported, bank.num_documents)
    if scores is not None and also is None and bank.layout.axes is None and documents.shape[2] < some:
        documents = top_k_indices(scores.reshape(layers * b, -1), some).reshape(layers, b, -1)
    everyone = jnp.moveaxis(documents, 0, 1).reshape(b, -1)
    if scores is not None:
        found = jnp.take_along_axis(scores, jnp.broadcast_to(everyone, (layers, *everyone.shape)), axis=2)
    else:
        layer = lambda x: scores_of(Query(x[0], query.route), bank.layer_at(x[1]), everyone)  # noqa: E731
        found = jax.lax.map(layer, (query.vectors, jnp.arange(layers)))
        seen = True if visible is None else jnp.take_along_axis(visible, everyone, axis=1)
        found = jnp.where(seen, found, NO_SCORE)
    if also is not None:
        # What the question's own tokens scored is known of what they selected.
        equal = everyone[None, :, :, None] == also.documents[:, :, None, :]
        found = jnp.maximum(found, jnp.max(jnp.where(equal, also.scores[:, :, None, :], NO_SCORE), axis=3))
    return documents, found
