"""Linear layers, contracted as one two-dimensional product."""

from __future__ import annotations

import jax
from flax import nnx

from msa_jax.config import AttentionConfig


def _flat_dot_general(x, kernel, dimension_numbers, precision=None, preferred_element_type=None, **unused):
    """`x @ kernel` over flattened leading axes.

    XLA's CPU backend runs the weight gradient of [B, T, E] inputs three times slower than that of [B * T, E].
    """
    del dimension_numbers, unused  # always the last axis of x with the first of the kernel
    out = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())),
        precision=precision, preferred_element_type=preferred_element_type,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(size: int, out: int, config: AttentionConfig, rngs: nnx.Rngs, *, bias: bool = False) -> nnx.Linear:
    """Kernel [size, out] and bias [out] in the storage dtype, product in the compute dtype."""
    return nnx.Linear(
        size, out, use_bias=bias, dtype=config.compute_dtype, param_dtype=config.storage_dtype,
        dot_general=_flat_dot_general, rngs=rngs,
    )  # fmt: skip
