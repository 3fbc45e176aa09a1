"""`chunk_scores`: the routing product of Memory Sparse Attention (arXiv 2603.23516, section 3.2)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.chunk_scores import reference
from pallas_kernels.dispatch import resolve

NO_SCORE = reference.NO_SCORE


def chunk_scores(
    query: jax.Array,
    keys: jax.Array,
    *,
    query_mask: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Score of every chunk for every question: `max over tokens t of query[b, t] . keys[c]`.

    The mean over heads of the paper commutes with the dot product, so `query` is summed over the heads of a
    group and divided by H beforehand, and nothing per head is computed. Memory is O(B·C) beyond the keys.
    Differentiable in `query` and in float `keys`: a chunk's gradient goes to its winning token only (the
    first of equals).

    Args:
      query: [B, T, M] float, group-summed routing queries.
      keys: [C, M] float32, bfloat16, or int8 (then `key_scale` is needed).
      query_mask: [B, T] bool, True where a token routes; default all.
      key_scale: [C] float32, positive: a key is `keys[c] * key_scale[c]`. No gradient reaches it.
      implementation: None for the best of the platform, or "xla", "tpu", "gpu", which never falls back.

    Returns:
      [B, C] float32; `NO_SCORE` (-1e30) throughout for a question in which no token routes.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: the named implementation cannot run this.
    """
    if query.ndim != 3 or keys.ndim != 2 or query.shape[-1] != keys.shape[-1]:
        raise ValueError(f"chunk_scores: need query [B, T, M] and keys [C, M], got {query.shape} and {keys.shape}.")
    if keys.dtype == jnp.int8 and key_scale is None:
        raise ValueError("chunk_scores: int8 keys need key_scale [C].")
    if key_scale is not None and key_scale.shape != keys.shape[:1]:
        raise ValueError(f"chunk_scores: key_scale must be [C] = {keys.shape[:1]}, got {key_scale.shape}.")
    if query_mask is None:
        query_mask = jnp.ones(query.shape[:2], bool)
    if query_mask.shape != query.shape[:2] or query_mask.dtype != jnp.bool_:
        raise ValueError(
            f"chunk_scores: query_mask must be bool [B, T] = {query.shape[:2]}, "
            f"got {query_mask.dtype} {query_mask.shape}."
        )
    resolve("chunk_scores", implementation, ("xla",))
    tile = reference.tile_size(query.shape[0], query.shape[1], keys.shape[0])
    return _chunk_scores(tile, query, keys, query_mask, key_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_scores(tile, query, keys, query_mask, key_scale):
    return reference.forward(query, keys, query_mask, key_scale, tile=tile)[0]


def _fwd(tile, query, keys, query_mask, key_scale):
    scores, winners = reference.forward(query, keys, query_mask, key_scale, tile=tile)
    return scores, (query, keys, query_mask, key_scale, winners)


def _bwd(tile, residuals, grad):
    query, keys, query_mask, key_scale, winners = residuals
    if key_scale is not None:
        grad = grad * key_scale[None, :]
    grad_query, grad_keys = reference.backward(query, keys, query_mask, winners, grad, tile=tile)
    if not jnp.issubdtype(keys.dtype, jnp.floating):
        grad_keys = np.zeros(keys.shape, jax.dtypes.float0)
    grad_scale = None if key_scale is None else jnp.zeros_like(key_scale)
    return grad_query, grad_keys, np.zeros(query_mask.shape, jax.dtypes.float0), grad_scale


_chunk_scores.defvjp(_fwd, _bwd)
