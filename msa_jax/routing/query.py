"""What routes and what is routed to: one vector a token, one a chunk (arXiv 2603.23516, section 3.2).

Sizes: B questions, T active tokens, H query heads, K key/value heads, D head dim, M = K * D, C chunks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Inside the square root: a zero vector stays zero and its gradient stays finite in every dtype.
_EPS = 1e-12


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


def averaged(query: jax.Array, route: jax.Array, mean_over_tokens: bool | jax.Array) -> jax.Array:
    """Queries [B, T, M] with every token's replaced by the mean of those that route [B, T]: the max then is the mean.

    `mean_over_tokens` says whether; it may be traced, so that changing phase of a training does not recompile.
    """
    if mean_over_tokens is False:
        return query
    weights = route[..., None].astype(query.dtype)
    mean = jnp.sum(query * weights, axis=1, keepdims=True) / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)
    return jnp.where(mean_over_tokens, mean, query)
