"""Rotary position embedding (Su et al., arXiv 2104.09864), the half-split form, plain or stretched."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from msa_jax.spec import RopeScaling


def _yarn(plain: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Frequencies that turn seldom within the training's length are divided, those that turn often are not."""
    half = len(plain)

    def dimension(turns: float) -> float:
        """Which pair of dimensions turns so often within the training's length."""
        return half * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(theta)

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    ramp = np.clip((np.arange(half) - first) / ((last - first) or 1e-3), 0, 1)
    return plain * (1 - ramp) + plain / scaling.factor * ramp


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = scaling.original_length * plain / (2 * math.pi)  # within the training's length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)


def stretched(half: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Angle a position of each of D / 2 pairs of dimensions, float64, and what multiplies queries and keys."""
    plain = theta ** (-np.arange(half) / half)
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    sharper = scaling.attention_factor
    return _yarn(plain, theta, scaling), 0.1 * math.log(scaling.factor) + 1 if sharper is None else sharper


def rope(x: jax.Array, positions: jax.Array, *, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Rotate `x` [..., T, heads, D] by its `positions` [..., T] (integers); float32 inside, x's dtype out."""
    half, times = x.shape[-1] // 2, 1.0
    if scaling is None:
        frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    else:
        frequencies, times = stretched(half, theta, scaling)
        frequencies = jnp.asarray(frequencies, jnp.float32)
    positions = jnp.broadcast_to(positions[..., None], (*positions.shape, half))
    angles = positions.astype(jnp.float32) * jnp.broadcast_to(frequencies, positions.shape)
    sin, cos = jnp.sin(angles)[..., None, :], jnp.cos(angles)[..., None, :]
    if times != 1.0:
        sin, cos = times * sin, times * cos
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
