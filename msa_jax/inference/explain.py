"""Which documents the router finds for a question: scores by layer, the best chunk, and the token that found it.

Sizes: L_r router layers, T tokens of the question, n chunks of a document, N documents, M router width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.context import Route
from msa_jax.data.batch import ROUTING
from msa_jax.memory import MemoryBank
from msa_jax.model import MSATransformer
from msa_jax.routing import need_scores, top_k_indices
from pallas_kernels.chunk_scores.api import NO_SCORE

# Questions are padded to a power of two of at least this.
_SHORTEST = 32
_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())


class Found(NamedTuple):
    """A document of the bank that the router finds.

    Attributes:
      index: in the bank.
      scores: [L_r] float32. ranks: [L_r] int, from 1.
      chunks: [L_r] int, the best chunk, from 0 within the document.
      tokens: [L_r] int, which token of the question finds that chunk.
    """

    index: int
    scores: np.ndarray
    ranks: np.ndarray
    chunks: np.ndarray
    tokens: np.ndarray


def best_chunk(
    queries: jax.Array,
    keys: jax.Array,
    *,
    route: jax.Array | None = None,
    valid: jax.Array | None = None,
    key_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The chunk that gives a document its score in one layer.

    Args:
      queries: [T, M] float32, of `ModelOutput.queries`.
      keys: [n, M] float, or int8 with `key_scale` [n] float32.
      route: [T] bool, tokens that route; default all. valid: [n] bool, chunks to consider; default all.

    Returns:
      Chunk and token, int32, the first of equals, and their score, float32.
    """
    if keys.dtype != jnp.int8:
        queries = queries.astype(keys.dtype)  # as routing does
    else:
        keys = keys.astype(queries.dtype)
    products = jnp.einsum("tm,nm->nt", queries, keys, preferred_element_type=jnp.float32)
    if key_scale is not None:
        products = products * key_scale[:, None]
    if route is not None:
        products = jnp.where(route[None, :], products, NO_SCORE)
    if valid is not None:
        products = jnp.where(valid[:, None], products, NO_SCORE)
    chunk, token = jnp.unravel_index(jnp.argmax(products), products.shape)
    return chunk, token, products[chunk, token]


@functools.partial(jax.jit, static_argnames="size")
def _best_chunks(queries, route, keys, key_scale, start, length, *, size):
    """`best_chunk` of each layer, [L_r] each, of chunks start to start + length of keys [L_r, C, M]."""
    begin = jnp.minimum(start, keys.shape[1] - size)
    take = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)  # noqa: E731
    chunks = begin + jnp.arange(size)
    valid = (chunks >= start) & (chunks < start + length)
    one = functools.partial(best_chunk, route=route, valid=valid)
    scale = None if key_scale is None else take(key_scale)
    chunk, token, score = jax.vmap(lambda q, k, s: one(q, k, key_scale=s))(queries, take(keys), scale)
    return begin + chunk - start, token, score


@functools.partial(jax.jit, static_argnames=("graphdef", "documents"))
def _route(graphdef, params, prefix, tokens, route, length, bank, visible, *, documents):
    """Best documents [d] by mean score, their scores and ranks [L_r, d], and queries [L_r, T, M]."""
    model: MSATransformer = nnx.merge(graphdef, params)
    output = model.prefill(
        tokens[None],
        lengths=length[None],
        template=model.encode_template(prefix[None]),
        read=Route(bank, route[None], None if visible is None else visible[None], want=("scores", "queries")),
    )
    scores = output.document_scores[:, 0]
    best = top_k_indices(jnp.mean(scores, axis=0, keepdims=True), documents)[0]
    chosen = scores[:, best]
    ranks = 1 + jnp.sum(scores[:, None, :] > chosen[:, :, None], axis=2)
    return best, chosen, ranks, output.queries[:, 0]


def explain_question(
    model: MSATransformer,
    prefix: Sequence[int],
    tokens: Sequence[int],
    roles: Sequence[int],
    bank: MemoryBank,
    *,
    visible: np.ndarray | None = None,
    documents: int = 5,
) -> list[Found]:
    """The documents that the router finds best for a question, by mean score over router layers, best first.

    The scores are those of the first round. Compiled once for questions of about the same length; under the mesh of a
    bank that is spread.

    Args:
      model: that the bank was made with.
      prefix: tokens of the template's prefix.
      tokens, roles: of the framed question, as `Renderer.prompt` gives them; tokens of role 0 route.
      bank: to find them in.
      visible: [N] bool, documents that the question may see; default all.
      documents: how many, at most.

    Raises:
      ValueError: `documents` below 1, no token that routes, or keys that another process holds.
      ConfigError: a retriever that scores only some documents.
    """
    need_scores(model.config.retriever, "explain")
    if documents < 1:
        raise ValueError(f"explain: documents must be at least 1, got {documents}.")
    if ROUTING not in roles:
        raise ValueError("explain: the question has no token that routes.")
    size = max(_SHORTEST, 1 << (len(tokens) - 1).bit_length())
    padded, route = np.zeros(size, np.int32), np.zeros(size, bool)
    padded[: len(tokens)] = tokens
    route[: len(tokens)] = np.asarray(roles) == ROUTING
    best, scores, ranks, queries = jax.device_get(
        _route(
            *nnx.split(model), np.asarray(prefix, np.int32), padded, route, np.int32(len(tokens)), bank, visible,
            documents=min(documents, bank.num_documents),
        )
    )  # fmt: skip
    starts, lengths = (np.asarray(x[best]) for x in (bank.layout.starts, bank.layout.lengths))
    found = []
    for i, index in enumerate(best.tolist()):
        if scores[0, i] <= NO_SCORE / 2:
            break  # from here on there are only documents that it may not see
        keys, key_scale, start = _held(bank, int(starts[i]))
        size = min(1 << (int(lengths[i]) - 1).bit_length(), keys.shape[1])
        with jax.set_mesh(_NO_MESH):  # a device's part alone is no array of the mesh
            chunks, at, _ = _best_chunks(queries, route, keys, key_scale, start, lengths[i], size=size)
        found.append(Found(index, scores[:, i], ranks[:, i], np.asarray(chunks), np.asarray(at)))
    return found


def _held(bank: MemoryBank, chunk: int) -> tuple[jax.Array, jax.Array | None, int]:
    """A device's part of the routing keys and their scales, and which of its chunks `chunk` is.

    A document is whole in one part, so that reading it moves no other.
    """
    scales = () if bank.key_scale is None else jnp.asarray(bank.key_scale).addressable_shards
    scale_on = {shard.device: shard.data for shard in scales}
    for shard in jnp.asarray(bank.routing_keys).addressable_shards:
        first = shard.index[1].start or 0
        if first <= chunk < first + shard.data.shape[1]:
            return shard.data, scale_on.get(shard.device), chunk - first
    raise ValueError("explain: the document's keys are on another process's device: ask there.")
