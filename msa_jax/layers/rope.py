"""Rotary position embedding (Su et al., arXiv 2104.09864), the half-split form that Qwen3 uses."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope(x: jax.Array, positions: jax.Array, *, theta: float) -> jax.Array:
    """Rotate `x` [..., T, heads, D] by its `positions` [..., T] (integers); float32 inside, x's dtype out."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = jnp.broadcast_to(positions[..., None], (*positions.shape, half))
    angles = positions.astype(jnp.float32) * jnp.broadcast_to(frequencies, positions.shape)
    sin, cos = jnp.sin(angles)[..., None, :], jnp.cos(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
