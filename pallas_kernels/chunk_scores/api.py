"""`chunk_scores`: the routing product of Memory Sparse Attention (arXiv 2603.23516, section 3.2)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.chunk_scores import reference

NO_SCORE = reference.NO_SCORE


def chunk_scores(
    query: jax.Array,
    keys: jax.Array,
    *,
    query_mask: jax.Array | None = None,
    query_scale: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Score of every chunk for every question: `max over tokens t of query[b, t] . keys[c]`.

    The mean over heads of the paper commutes with the dot product, so `query` is summed over the heads of a
    group and divided by H beforehand, and nothing per head is computed. Memory is O(B·C) beyond the keys.
    Differentiable in float `query` and float `keys`: a chunk's gradient goes to its winning token only (the
    first of equals).

    Args:
      query: [B, T, M] float, group-summed routing queries; or int8 (then `query_scale` is needed, and `keys`
        must be int8: the product is of integers, twice as fast where the hardware has it).
      keys: [C, M] float32, bfloat16, or int8 (then `key_scale` is needed).
      query_mask: [B, T] bool, True where a token routes; default all.
      query_scale: [B, T] float32: a query is `query[b, t] * query_scale[b, t]`. No gradient reaches it.
      key_scale: [C] float32, positive: a key is `keys[c] * key_scale[c]`. No gradient reaches it.
      layer: scalar int32: `keys` are [L, C, M] (and `key_scale` [L, C]), those of this layer score, and a kernel
        reads them where they lie. In a scan over layers that spares a copy of every layer's keys; for training
        pass a layer's own keys, as the gradient has the size of what is passed.
      implementation: None for the best of the platform, or "xla", "tpu", "gpu", which never falls back.

    Returns:
      [B, C] float32; `NO_SCORE` (-1e30) throughout for a question in which no token routes.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: the named implementation cannot run this.
    """
    dims = "[C, M]" if layer is None else "[L, C, M] (with a layer)"
    if query.ndim != 3 or keys.ndim != (2 if layer is None else 3) or query.shape[-1] != keys.shape[-1]:
        raise ValueError(f"chunk_scores: need query [B, T, M] and keys {dims}, got {query.shape} and {keys.shape}.")
    if keys.dtype == jnp.int8 and key_scale is None:
        raise ValueError("chunk_scores: int8 keys need key_scale [C].")
    if query.dtype == jnp.int8 and (query_scale is None or keys.dtype != jnp.int8):
        raise ValueError(f"chunk_scores: an int8 query needs query_scale [B, T] and int8 keys, got {keys.dtype} keys.")
    if key_scale is not None and key_scale.shape != keys.shape[:-1]:
        scale_dims = dims.replace(", M", "")
        raise ValueError(f"chunk_scores: key_scale must be {scale_dims} = {keys.shape[:-1]}, got {key_scale.shape}.")
    if query_scale is not None and query_scale.shape != query.shape[:2]:
        raise ValueError(f"chunk_scores: query_scale must be [B, T] = {query.shape[:2]}, got {query_scale.shape}.")
    if query_mask is None:
        query_mask = jnp.ones(query.shape[:2], bool)
    if query_mask.shape != query.shape[:2] or query_mask.dtype != jnp.bool_:
        raise ValueError(
            f"chunk_scores: query_mask must be bool [B, T] = {query.shape[:2]}, "
            f"got {query_mask.dtype} {query_mask.shape}."
        )
    module = dispatch.choose("chunk_scores", implementation, query=query, keys=keys)
    if layer is not None:
        layer = jnp.asarray(layer, jnp.int32)
    return _chunk_scores(module, query, keys, query_mask, query_scale, key_scale, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_scores(module, query, keys, query_mask, query_scale, key_scale, layer):
    return module.forward(query, keys, query_mask, query_scale, key_scale, layer, winners=False)[0]


def _fwd(module, query, keys, query_mask, query_scale, key_scale, layer):
    scores, winners = module.forward(query, keys, query_mask, query_scale, key_scale, layer, winners=True)
    return scores, (query, keys, query_mask, query_scale, key_scale, layer, winners)


def _bwd(module, residuals, grad):
    query, keys, query_mask, query_scale, key_scale, layer, winners = residuals
    all_keys = keys
    if layer is not None:
        keys = keys[layer]
        key_scale = None if key_scale is None else key_scale[layer]
    grad = jnp.where(jnp.any(query_mask, axis=1)[:, None], grad, 0.0)
    if key_scale is not None:
        grad = grad * key_scale[None, :]
    if query_scale is not None:
        grad = grad * jnp.take_along_axis(query_scale, winners, axis=1)
    grad_query = _no_gradient(query)
    grad_keys = _no_gradient(keys)
    floats = tuple(jnp.issubdtype(x.dtype, jnp.floating) for x in (query, keys))
    if any(floats):
        # A token that does not route may hold anything, and 0 * NaN is NaN.
        query = jnp.where(query_mask[:, :, None], query, 0)
        computed = module.backward(query, keys, winners, grad, wanted=floats)
        grad_query = computed[0] if floats[0] else grad_query
        grad_keys = computed[1] if floats[1] else grad_keys
    if layer is not None:
        grad_keys = jnp.zeros_like(all_keys).at[layer].set(grad_keys) if floats[1] else _no_gradient(all_keys)
    zero = lambda scale: None if scale is None else jnp.zeros_like(scale)  # noqa: E731
    no_layer = None if layer is None else _no_gradient(layer)
    return grad_query, grad_keys, _no_gradient(query_mask), zero(query_scale), zero(residuals[4]), no_layer


def _no_gradient(x):
    return np.zeros(x.shape, jax.dtypes.float0)


_chunk_scores.defvjp(_fwd, _bwd)
