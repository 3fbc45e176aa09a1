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
# Most elements of the keys of a tile, which is a copy that should stay in cache: 16 MiB of float32.
_KEY_ELEMENTS = 1 << 22


def unsupported(*, query, keys) -> str | None:
    """Why a case cannot run, or None: this form runs every one."""
    del query, keys
    return None


def _products(query, keys):
    """[B, T, M] x [c, M] -> [B, T, c] float32, as one two-dimensional matrix product."""
    b, t, m = query.shape
    if query.dtype == jnp.int8:
        accumulator, dtype = jnp.int32, jnp.int8
    else:
        keys = keys.astype(query.dtype) if keys.dtype == jnp.int8 else keys
        accumulator, dtype = jnp.float32, jnp.promote_types(query.dtype, keys.dtype)
    out = jax.lax.dot_general(
        query.astype(dtype).reshape(b * t, m),
        keys.astype(dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=accumulator,
    )
    return out.astype(jnp.float32).reshape(b, t, keys.shape[0])


def _over_tiles(tile_fn, init, num_chunks, tile):
    """Fold `tile_fn(carry, start, size) -> carry` over [0, num_chunks), the last tile possibly short."""
    full = num_chunks // tile
    carry = init
    if full:
        carry = jax.lax.fori_loop(0, full, lambda i, c: tile_fn(c, i * tile, tile), carry)
    if num_chunks % tile:
        carry = tile_fn(carry, full * tile, num_chunks % tile)
    return carry


def tile_size(batch: int, tokens: int, num_chunks: int, width: int) -> int:
    """Chunks scored at once: all of them if the [B, T, C] products stay within 64 MiB, else few enough."""
    most = _TILE_ELEMENTS // max(1, batch * tokens)
    if most >= num_chunks:
        return max(1, num_chunks)
    return min(num_chunks, max(256, min(most, _KEY_ELEMENTS // max(1, width))))


@functools.partial(jax.jit, static_argnames="winners")
def forward(query, keys, query_mask, query_scale, key_scale, layer=None, *, winners):
    """Scores [B, C] float32 and the token that won each chunk, [B, C] int32 or None; O(B·T·tile + B·C) memory.

    Args:
      query: [B, T, M]; query_mask: [B, T] bool; query_scale: [B, T] or None.
      keys: [C, M], or [L, C, M] with `layer`; key_scale: [C] or None, or [L, C] with `layer`.
      layer: scalar int32 or None.
    """
    b, t, m = query.shape
    num_chunks = keys.shape[-2]
    tile = tile_size(b, t, num_chunks, m)

    def score(part):
        products = _products(query, part)
        if query_scale is not None:
            products = products * query_scale[:, :, None]
        products = jnp.where(query_mask[:, :, None], products, NO_SCORE)
        won = (jnp.argmax(products, axis=1).astype(jnp.int32),) if winners else ()
        return (jnp.max(products, axis=1), *won)

    def part_of(start, size):
        if layer is None:
            return jax.lax.dynamic_slice_in_dim(keys, start, size)
        return jax.lax.dynamic_slice(keys, (layer, start, 0), (1, size, m))[0]

    def body(carry, start, size):
        parts = score(part_of(start, size))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)
            for whole, part in zip(carry, parts, strict=True)
        )

    if tile >= num_chunks:
        carry = score(part_of(0, num_chunks))
    else:
        init = (jnp.zeros((b, num_chunks), jnp.float32), jnp.zeros((b, num_chunks), jnp.int32))
        carry = _over_tiles(body, init if winners else init[:1], num_chunks, tile)
    if key_scale is not None and layer is not None:
        key_scale = key_scale[layer]
    return scale_scores(carry[0], key_scale), carry[1] if winners else None


def scale_scores(scores, key_scale):
    """Scores times the positive scale of their chunk, which commutes with the max over tokens."""
    if key_scale is None:
        return scores
    return jnp.where(scores > NO_SCORE / 2, scores * key_scale[None, :], NO_SCORE)


@functools.partial(jax.jit, static_argnames="wanted")
def backward(query, keys, winners, grad, *, wanted):
    """Gradients of query and keys: each chunk's gradient goes to its winning token alone.

    Args:
      query: [B, T, M], keys: [C, M], winners: [B, C] int32, as of `forward`.
      grad: [B, C] float32, the scores' gradient times the scales that apply.
      wanted: whether the gradient of query, of keys is needed; None stands for one that is not.
    """
    b, t, m = query.shape
    tokens = jnp.arange(t, dtype=jnp.int32)
    flat_query = query.astype(jnp.float32).reshape(b * t, m)

    def body(carry, start, size):
        grad_query, grad_keys = carry
        part = jax.lax.dynamic_slice_in_dim(keys, start, size).astype(jnp.float32)
        won = jax.lax.dynamic_slice_in_dim(winners, start, size, axis=1)
        part_grad = jax.lax.dynamic_slice_in_dim(grad, start, size, axis=1)
        routed = jnp.where(won[:, None, :] == tokens[None, :, None], part_grad[:, None, :], 0.0)
        routed = routed.reshape(b * t, size)
        if wanted[0]:
            grad_query = grad_query + jnp.dot(routed, part, preferred_element_type=jnp.float32)
        if wanted[1]:
            part_keys = jnp.dot(routed.T, flat_query, preferred_element_type=jnp.float32)
            grad_keys = jax.lax.dynamic_update_slice_in_dim(grad_keys, part_keys, start, axis=0)
        return grad_query, grad_keys

    init = (
        jnp.zeros((b * t, m), jnp.float32) if wanted[0] else None,
        jnp.zeros(keys.shape, jnp.float32) if wanted[1] else None,
    )
    grad_query, grad_keys = _over_tiles(body, init, keys.shape[0], tile_size(b, t, keys.shape[0], m))
    return (
        grad_query.reshape(b, t, m).astype(query.dtype) if wanted[0] else None,
        grad_keys.astype(keys.dtype) if wanted[1] else None,
    )
