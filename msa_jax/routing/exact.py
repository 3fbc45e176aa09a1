"""Exact routing: every chunk is scored, and the best documents are selected (arXiv 2603.23516, section 3.2).

Sizes: B questions, T active tokens, M router width, C chunks, N documents, k documents selected.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from msa_jax.memory.bank import DocumentLayout, LayerMemory
from msa_jax.memory.selection import Selection
from msa_jax.routing.interface import Query
from pallas_kernels import chunk_scores
from pallas_kernels.chunk_scores.api import NO_SCORE

# Chunks of a document read in one pass over the documents; a longer document takes several.
_CHUNKS_A_PASS = 16
# Reading every document's range costs N * max_length; beyond this many times C, a scatter over C costs less.
_MOST_RANGE_READS = 4
# Scores [B, N] below this many are selected from at once: two levels cost more calls than they save work.
_TWO_LEVELS_FROM = 1 << 17


def document_scores(
    query: jax.Array,
    keys: jax.Array,
    layout: DocumentLayout,
    *,
    route: jax.Array,
    visible: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Score of each document for each question: max over routing tokens and over its chunks.

    Args:
      query: [B, T, M] float from `routing_query`; taken to the dtype of float keys, and as it is to int8 keys.
      keys: [C, M] from `routing_key`, or int8 (then `key_scale` is needed); [L_r, C, M] with `layer`.
      layout: which chunks belong to which document.
      route: [B, T] bool, True where a token routes.
      visible: [B, N] bool, documents a question may see; default all.
      key_scale: [C] float32, what int8 keys count in; [L_r, C] with `layer`.
      layer: scalar int32, which of stacked keys to read, where they lie.
      implementation: of `chunk_scores`.

    Returns:
      [B, N] float32, `NO_SCORE` for documents that are absent or not visible.
    """
    if keys.dtype != jnp.int8:
        query = query.astype(keys.dtype)
    per_chunk = chunk_scores(
        query, keys, query_mask=route, key_scale=key_scale, layer=layer, implementation=implementation
    )
    scores = _document_max(per_chunk, layout)
    allowed = (layout.lengths > 0)[None, :]
    if visible is not None:
        allowed = allowed & visible
    return jnp.where(allowed, scores, NO_SCORE)


def _document_max(per_chunk: jax.Array, layout: DocumentLayout) -> jax.Array:
    """Max over each document's chunks, [B, C] -> [B, N]; of a document without chunks, anything at most `NO_SCORE`.

    Reading the ranges chunk by chunk fuses into one loop over [B, N] that keeps nothing but its result: on two CPU
    cores 1.4 to 3.3 times as fast as the scatter at 1.5M chunks, about equal at 16K (docs/benchmarks.md).
    With a very long document among short ones it would read C many times over; the scatter reads it once.
    """
    if layout.num_documents * layout.max_length <= _MOST_RANGE_READS * layout.num_chunks:
        return _range_max(layout.max_length, per_chunk, jnp.asarray(layout.starts), jnp.asarray(layout.lengths))
    # Chunk-major, so that the scatter takes contiguous rows of B. Chunks of no document may stand anywhere and
    # documents come in any order, so the segments are not sorted.
    return jax.ops.segment_max(per_chunk.T, layout.chunk_documents, num_segments=layout.num_documents + 1)[:-1].T


def _range_fold(max_length, per_chunk, starts, lengths, init, update):
    """Fold `update(carry, chunk [1, N], score [B, N], valid [1, N])` over the documents' first, second, ... chunks."""
    last = per_chunk.shape[1] - 1

    def one(carry, offset):
        chunk = jnp.minimum(starts + offset, last)
        return update(carry, chunk[None], jnp.take(per_chunk, chunk, axis=1), (offset < lengths)[None])

    def one_pass(i, carry):
        for offset in range(_CHUNKS_A_PASS):
            carry = one(carry, i * _CHUNKS_A_PASS + offset)
        return carry

    if max_length > _CHUNKS_A_PASS:
        return jax.lax.fori_loop(0, -(-max_length // _CHUNKS_A_PASS), one_pass, init)
    return functools.reduce(one, range(max_length), init)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _range_max(max_length, per_chunk, starts, lengths):
    init = jnp.full((per_chunk.shape[0], starts.shape[0]), NO_SCORE, per_chunk.dtype)
    larger = lambda best, chunk, score, valid: jnp.maximum(best, jnp.where(valid, score, NO_SCORE))  # noqa: E731
    return _range_fold(max_length, per_chunk, starts, lengths, init, larger)


def _range_max_fwd(max_length, per_chunk, starts, lengths):
    def larger(carry, chunk, score, valid):
        best, winner = carry
        won = valid & (score > best)
        return jnp.where(won, score, best), jnp.where(won, chunk, winner)

    # The winner of a document without chunks is any chunk: no gradient comes from there.
    winner = jnp.zeros((per_chunk.shape[0], starts.shape[0]), jnp.int32)
    best = jnp.full(winner.shape, NO_SCORE, per_chunk.dtype)
    best, winner = _range_fold(max_length, per_chunk, starts, lengths, (best, winner), larger)
    return best, (winner, jnp.zeros((0, per_chunk.shape[1]), per_chunk.dtype))


def _range_max_bwd(max_length, residuals, grad):
    # One chunk a document, the first of equals: N writes where differentiating the reads would cost N * max_length.
    winner, like = residuals
    rows = jnp.arange(winner.shape[0])[:, None]
    return jnp.zeros((winner.shape[0], like.shape[1]), like.dtype).at[rows, winner].add(grad), None, None


_range_max.defvjp(_range_max_fwd, _range_max_bwd)


def top_k_indices(scores: jax.Array, k: int, *, recall: float | None = None) -> jax.Array:
    """Where the k largest scores of each question are, best first.

    Args:
      scores: [B, N] float32.
      k: at most N.
      recall: None for exactly those, equal scores in order of their index, as `jax.lax.top_k` has them. Else
        `jax.lax.approx_max_k`, which finds this part of the k best on average, in (0, 1].

    Returns:
      [B, k] int32.
    """
    b, n = scores.shape
    if recall is not None and k:
        return jax.lax.approx_max_k(scores, k, recall_target=recall)[1]
    # A group of sqrt(N / k) makes both levels equally long.
    group = 1 << max(3, round(math.log2(max(n, 1) / max(k, 1)) / 2))
    if b * n < _TWO_LEVELS_FROM or -(-n // group) < 16 * k:
        return jax.lax.top_k(scores, k)[1]
    # Never a selection from all N: the k groups with the largest maxima hold the k largest scores, then a selection
    # from those k * group. Two CPU cores, k 16: 2.6x as fast at [64, 16K], 8x at [1, 1M], 9x at [64, 1M]. A group is
    # contiguous and the chosen ones stay in order, so that of equal scores the first wins at both levels.
    padded = jnp.pad(scores, ((0, 0), (0, -n % group)), constant_values=-jnp.inf).reshape(b, -1, group)
    groups = jnp.sort(jax.lax.top_k(jnp.max(padded, axis=2), k)[1], axis=1)
    candidates = jnp.take_along_axis(padded, groups[:, :, None], axis=1).reshape(b, k * group)
    place = jax.lax.top_k(candidates, k)[1]
    return jnp.take_along_axis(groups, place // group, axis=1) * group + place % group


def select(scores: jax.Array, layout: DocumentLayout, k: int, *, recall: float | None = None) -> Selection:
    """The min(k, N) best documents of `scores` [B, N]; gradients reach the scores, none the choice.

    `recall` as in `top_k_indices`.
    """
    documents = top_k_indices(jax.lax.stop_gradient(scores), min(k, layout.num_documents), recall=recall)
    return selection_of(documents, jnp.take_along_axis(scores, documents, axis=1), layout)


def selection_of(documents: jax.Array, scores: jax.Array, layout: DocumentLayout) -> Selection:
    """The selection of documents [B, k], best first, by their scores [B, k]; `NO_SCORE` selects nothing."""
    found = scores > NO_SCORE / 2
    return Selection(
        documents=documents.astype(jnp.int32),
        scores=jnp.where(found, scores, NO_SCORE),
        starts=jnp.asarray(layout.starts)[documents],
        lengths=jnp.where(found, jnp.asarray(layout.lengths)[documents], 0),
    )


@dataclasses.dataclass(frozen=True)
class Exact:
    """The retriever that scores every chunk: a `ScoringRetriever` over a memory on one device."""

    implementation: str | None = None

    def route(self, query: Query, memory: LayerMemory, visible: jax.Array | None, k: int) -> Selection:
        return self.route_with_scores(query, memory, visible, k)[1]

    def route_with_scores(
        self, query: Query, memory: LayerMemory, visible: jax.Array | None, k: int
    ) -> tuple[jax.Array, Selection]:
        scores = document_scores(
            query.vectors, memory.routing_keys, memory.layout, route=query.route, visible=visible,
            key_scale=memory.key_scale, layer=memory.index, implementation=self.implementation,
        )  # fmt: skip
        return scores, self.select(scores, memory.layout, k)

    def select(self, scores: jax.Array, layout: DocumentLayout, k: int) -> Selection:
        """The best documents of scores [B, N]."""
        return select(scores, layout, k)
