"""The MLP of a decoder layer, gated (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from msa_jax.config import MSAConfig
from msa_jax.layers.linear import linear
from msa_jax.spec import DEFAULT, LayerSpec

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class GatedMLP(nnx.Module):
    """`(f(x W_gate) * x W_up) W_down`, [..., E] to [..., E], inner width F; SwiGLU where f is silu.

    The spec says f, and whether biases are added.
    """

    def __init__(self, config: MSAConfig, spec: LayerSpec = DEFAULT, *, rngs: nnx.Rngs):
        self.activation = _ACTIVATIONS[spec.activation]
        self.gate = linear(config.hidden_size, config.mlp_size, config, rngs, bias=spec.mlp_bias)
        self.up = linear(config.hidden_size, config.mlp_size, config, rngs, bias=spec.mlp_bias)
        self.down = linear(config.mlp_size, config.hidden_size, config, rngs, bias=spec.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))
