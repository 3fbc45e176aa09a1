"""SwiGLU (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class SwiGLU(nnx.Module):
    """`(silu(x W_gate) * x W_up) W_down`, [..., E] to [..., E], inner width F, no biases."""

    def __init__(self, size: int, inner: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kwargs = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = nnx.Linear(size, inner, **kwargs)
        self.up = nnx.Linear(size, inner, **kwargs)
        self.down = nnx.Linear(inner, size, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
