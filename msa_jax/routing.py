"""Routing: which documents a question reads (arXiv 2603.23516, section 3.2).

Sizes: B questions, T active tokens, H query heads, K key/value heads, D head dim, M = K * D, C chunks,
N documents, k documents selected.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from msa_jax.memory import DocumentLayout
from pallas_kernels import chunk_scores
from pallas_kernels.chunk_scores.api import NO_SCORE

# Inside the square root: a zero vector stays zero and its gradient stays finite in every dtype.
_EPS = 1e-12


@struct.dataclass
class Selection:
    """Documents that a router layer reads for each question, best first.

    Attributes:
      documents: [B, k] int32 document indices.
      scores: [B, k] float32, `NO_SCORE` where fewer than k documents were visible.
      starts, lengths: [B, k] int32, chunk ranges; length 0 where nothing was selected.
    """

    documents: jax.Array
    scores: jax.Array
    starts: jax.Array
    lengths: jax.Array


def l2_normalise(x: jax.Array) -> jax.Array:
    """Unit vectors along the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)


def routing_query(projected: jax.Array, *, num_kv_heads: int, score: str) -> jax.Array:
    """Fold per-head routing queries [B, T, H, D] into one vector a token, [B, T, M] float32.

    The mean over heads of `cos(q_h, k_{h/G})` equals the dot product of the key with the sum over each
    group's normalised queries, divided by H. With `score="dot"` the per-head score is `q.k / sqrt(D)`.
    """
    b, t, h, d = projected.shape
    unit = l2_normalise(projected) if score == "cosine" else projected.astype(jnp.float32) * d**-0.5
    grouped = unit.reshape(b, t, num_kv_heads, h // num_kv_heads, d)
    return (jnp.sum(grouped, axis=3) / h).reshape(b, t, num_kv_heads * d)


def routing_key(pooled: jax.Array, *, score: str) -> jax.Array:
    """Stored routing keys [..., C, M] float32 from pooled ones [..., C, K, D]."""
    unit = l2_normalise(pooled) if score == "cosine" else pooled.astype(jnp.float32)
    return unit.reshape(*unit.shape[:-2], unit.shape[-2] * unit.shape[-1])


def mean_query(query: jax.Array, mask: jax.Array) -> jax.Array:
    """Every routing token replaced by their mean: the max over tokens then is the mean over tokens."""
    weights = mask[..., None].astype(query.dtype)
    mean = jnp.sum(query * weights, axis=1, keepdims=True) / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)
    return jnp.broadcast_to(mean, query.shape)


def document_scores(
    query: jax.Array,
    keys: jax.Array,
    layout: DocumentLayout,
    *,
    route: jax.Array,
    visible: jax.Array | None = None,
    mean_over_tokens: bool | jax.Array = False,
    implementation: str | None = None,
) -> jax.Array:
    """Score of each document for each question: max over routing tokens and over its chunks.

    Args:
      query: [B, T, M] float32 from `routing_query`.
      keys: [C, M] from `routing_key`.
      layout: which chunks belong to which document.
      route: [B, T] bool, True where a token routes.
      visible: [B, N] bool, documents a question may see; default all.
      mean_over_tokens: average over routing tokens instead of taking their max (warm-up of training). May
        be traced, so that changing phase does not recompile.
      implementation: of `chunk_scores`.

    Returns:
      [B, N] float32, `NO_SCORE` for documents that are absent or not visible.
    """
    if mean_over_tokens is not False:
        query = jnp.where(mean_over_tokens, mean_query(query, route), query)
    per_chunk = chunk_scores(query.astype(keys.dtype), keys, query_mask=route, implementation=implementation)
    # Chunk-major, so that the segment max reduces contiguous rows of B. Chunks of no document may stand
    # anywhere, so the segments are not sorted.
    scores = jax.ops.segment_max(
        per_chunk.T,
        layout.chunk_documents,
        num_segments=layout.num_documents + 1,
    )[:-1].T
    allowed = (layout.lengths > 0)[None, :]
    if visible is not None:
        allowed = allowed & visible
    return jnp.where(allowed, scores, NO_SCORE)


def select(scores: jax.Array, layout: DocumentLayout, *, top_k: int) -> Selection:
    """The min(k, N) best documents of `scores` [B, N]; gradients reach the scores, none the choice."""
    best, documents = jax.lax.top_k(scores, min(top_k, layout.num_documents))
    found = best > NO_SCORE / 2
    return Selection(
        documents=documents.astype(jnp.int32),
        scores=jnp.where(found, best, NO_SCORE),
        starts=jnp.asarray(layout.starts)[documents],
        lengths=jnp.where(found, jnp.asarray(layout.lengths)[documents], 0),
    )


def bias_of(selection: Selection, beta: jax.Array) -> jax.Array:
    """Router bias [B, k, H]: `beta_h * (s_d - max s)`, 0 where nothing was selected."""
    found = selection.lengths > 0
    scores = jnp.where(found, selection.scores, 0.0)
    best = jnp.max(jnp.where(found, selection.scores, NO_SCORE), axis=1, keepdims=True)
    gap = jnp.where(found, scores - best, 0.0)
    return gap[:, :, None] * beta.astype(jnp.float32)[None, None, :]
