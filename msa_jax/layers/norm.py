"""RMSNorm in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from msa_jax.config import AttentionConfig
from msa_jax.spec import LayerSpec


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, computed in float32, returned in `dtype`.

    With `plus_one` the factor is `1 + scale`, and scale starts at 0.
    """

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype, param_dtype: jnp.dtype, plus_one: bool = False):
        self.scale = nnx.Param(jnp.full((size,), 0 if plus_one else 1, param_dtype))
        self.eps = eps
        self.plus_one = plus_one
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        scale = jnp.broadcast_to(1 + scale if self.plus_one else scale, x.shape)
        return (x * scale).astype(self.dtype)


def norm_of(size: int, config: AttentionConfig, spec: LayerSpec) -> RMSNorm:
    """The norm of layers of a spec."""
    return RMSNorm(
        size, eps=config.norm_eps, dtype=config.compute_dtype, param_dtype=config.storage_dtype,
        plus_one=spec.norm == "rms_plus_one",
    )  # fmt: skip
