"""Starts that let small models learn to route and to copy; parameters only, the architecture is untouched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from msa_jax.config import MSAConfig
from msa_jax.model import MSATransformer


def embedding_stream(model: MSATransformer, *, embedding_std: float, logit_scale: float) -> None:
    """Start with a residual stream that holds the embedding alone, in place.

    Embeddings get the standard deviation `embedding_std`, the output projections of all layers start at 0 and
    the scale of the final norm at `logit_scale`. Token identities then survive to every layer, which is what
    matching and copying need; docs/training.md compares it with the usual start, embeddings of 0.02 below layers
    of unit output.
    """
    table = model.embed.embedding[...]
    # Any start has some scale; the wanted one is reached from it.
    model.embed.embedding[...] = table * (embedding_std / jnp.std(table.astype(jnp.float32))).astype(table.dtype)
    model.final_norm.scale[...] = jnp.full_like(model.final_norm.scale[...], logit_scale)
    for group in model.groups:
        for projection in (group.attention.o_proj, group.mlp.down):
            projection.kernel[...] = jnp.zeros_like(projection.kernel[...])


def tie_router(model: MSATransformer) -> None:
    """Set W_QR of every router layer to its W_KR, repeated over each group of heads, in place.

    A token then scores a chunk by how alike their hidden states are, instead of by two unrelated
    projections, which at 64 documents and more give no signal to start from.
    """
    c = model.config
    for (is_router, _, count), group in zip(c.layer_groups, model.groups, strict=True):
        if not is_router:
            continue
        kernel = group.attention.router_k_proj.kernel[...]
        heads = kernel.reshape(count, c.hidden_size, c.num_kv_heads, 1, c.head_dim)
        heads = jnp.broadcast_to(heads, (*heads.shape[:3], c.group_size, c.head_dim))
        group.attention.router_q_proj.kernel[...] = heads.reshape(count, c.hidden_size, -1)


def undoing(value: jax.Array, config: MSAConfig) -> jax.Array:
    """W_O [..., H * D, E] that takes what orthogonal W_V [..., E, M] made back, in equal parts of a group's heads."""
    c = config
    heads = value.reshape(*value.shape[:-1], c.num_kv_heads, 1, c.head_dim)
    heads = jnp.broadcast_to(heads, (*heads.shape[:-2], c.group_size, c.head_dim)) / c.group_size
    return jnp.swapaxes(heads.reshape(*value.shape[:-1], -1), -1, -2)


def copy_circuit(model: MSATransformer, scale: float, *, rngs: nnx.Rngs) -> None:
    """Make value and output projections of router layers copy what is attended to, in place.

    `W_V` becomes orthogonal (columns, if K * D < E) and `W_O` its transpose for every head, so that a token
    on which all heads attend adds about `scale` times its own normed hidden state to the residual stream.
    """
    c = model.config
    for (is_router, _, count), group in zip(c.layer_groups, model.groups, strict=True):
        if not is_router:
            continue
        make = nnx.initializers.orthogonal()
        keys = jax.random.split(rngs.params(), count)
        value = jnp.stack([make(key, (c.hidden_size, c.router_width), jnp.float32) for key in keys])
        group.attention.v_proj.kernel[...] = value.astype(c.storage_dtype)
        group.attention.o_proj.kernel[...] = (scale * undoing(value, c)).astype(c.storage_dtype)
