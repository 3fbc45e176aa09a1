"""Plain JAX form of `chunk_scores`: the oracle, and what runs where no kernel does.

Sizes: B questions, T routing tokens, C chunks, M router width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Score of a chunk for a question without routing tokens: finite, so that it survives a temperature.
NO_SCORE = -1e30
# Most elements of [B, T, chunks] held at once: 64 MiB of float32.
_TILE_ELEMENTS = 1 << 24


def _products(query, keys):
    """[B, T, M] x [c, M] -> [B, T, c] float32, as one two-dimensional matrix product."""
    b, t, m = query.shape
    if keys.dtype == jnp.int8:
        keys = keys.astype(query.dtype)
    dtype = jnp.promote_types(query.dtype, keys.dtype)
    out = jax.lax.dot_general(
        query.astype(dtype).reshape(b * t, m),
        keys.astype(dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(b, t, keys.shape[0])


def _over_tiles(tile_fn, init, num_chunks, tile):
    """Fold `tile_fn(carry, start, size) -> carry` over [0, num_chunks), the last tile possibly short."""
    full = num_chunks // tile
    carry = init
    if full:
        carry = jax.lax.fori_loop(0, full, lambda i, c: tile_fn(c, i * tile, tile), carry)
    if num_chunks % tile:
        carry = tile_fn(carry, full * tile, num_chunks % tile)
    return carry


def tile_size(batch: int, tokens: int, num_chunks: int) -> int:
    """Chunks scored at once, so that the [B, T, tile] products stay within 64 MiB."""
    return max(1, min(num_chunks, max(256, _TILE_ELEMENTS // max(1, batch * tokens))))


@functools.partial(jax.jit, static_argnames="tile")
def forward(query, keys, query_mask, key_scale, *, tile):
    """Scores [B, C] float32 and the token that won each chunk, [B, C] int32; peak memory O(B·T·tile + B·C)."""
    b, t, _ = query.shape
    num_chunks = keys.shape[0]

    def score(part):
        products = jnp.where(query_mask[:, :, None], _products(query, part), NO_SCORE)
        return jnp.max(products, axis=1), jnp.argmax(products, axis=1).astype(jnp.int32)

    def body(carry, start, size):
        scores, winners = carry
        part_scores, part_winners = score(jax.lax.dynamic_slice_in_dim(keys, start, size))
        return (
            jax.lax.dynamic_update_slice_in_dim(scores, part_scores, start, axis=1),
            jax.lax.dynamic_update_slice_in_dim(winners, part_winners, start, axis=1),
        )

    if tile >= num_chunks:
        scores, winners = score(keys)
    else:
        init = (jnp.zeros((b, num_chunks), jnp.float32), jnp.zeros((b, num_chunks), jnp.int32))
        scores, winners = _over_tiles(body, init, num_chunks, tile)
    if key_scale is not None:
        # A scale is positive, so it commutes with the max.
        scores = jnp.where(scores > NO_SCORE / 2, scores * key_scale[None, :], NO_SCORE)
    return scores, winners


@functools.partial(jax.jit, static_argnames="tile")
def backward(query, keys, query_mask, winners, grad, *, tile):
    """Gradients of query and float keys: each chunk's gradient goes to its winning token alone."""
    b, t, m = query.shape
    tokens = jnp.arange(t, dtype=jnp.int32)
    has_tokens = jnp.any(query_mask, axis=1)
    grad = jnp.where(has_tokens[:, None], grad, 0.0)
    flat_query = query.astype(jnp.float32).reshape(b * t, m)

    def body(carry, start, size):
        grad_query, grad_keys = carry
        part = jax.lax.dynamic_slice_in_dim(keys, start, size).astype(jnp.float32)
        won = jax.lax.dynamic_slice_in_dim(winners, start, size, axis=1)
        part_grad = jax.lax.dynamic_slice_in_dim(grad, start, size, axis=1)
        routed = jnp.where(won[:, None, :] == tokens[None, :, None], part_grad[:, None, :], 0.0)
        routed = routed.reshape(b * t, size)
        grad_query = grad_query + jnp.dot(routed, part, preferred_element_type=jnp.float32)
        part_keys = jnp.dot(routed.T, flat_query, preferred_element_type=jnp.float32)
        return grad_query, jax.lax.dynamic_update_slice_in_dim(grad_keys, part_keys, start, axis=0)

    init = (jnp.zeros((b * t, m), jnp.float32), jnp.zeros(keys.shape, jnp.float32))
    grad_query, grad_keys = _over_tiles(body, init, keys.shape[0], tile)
    return grad_query.reshape(b, t, m).astype(query.dtype), grad_keys.astype(keys.dtype)
