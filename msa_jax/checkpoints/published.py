"""Names, shapes and `config.json` of the published checkpoint layout (Qwen3's, with a router).

Equal consecutive layers are stored stacked on a leading axis here and one by one there; linear weights are
[in, out] here and [out, in] there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from msa_jax.config import PUBLISHED_ONLY, MSAConfig
from msa_jax.model import MSATransformer
from msa_jax.sharding import Shardings

_TOP = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("lm_head", "kernel"): "lm_head.weight",
}
_LAYER = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("attention", "q_proj", "kernel"): "self_attn.q_proj.weight",
    ("attention", "k_proj", "kernel"): "self_attn.k_proj.weight",
    ("attention", "v_proj", "kernel"): "self_attn.v_proj.weight",
    ("attention", "o_proj", "kernel"): "self_attn.o_proj.weight",
    ("attention", "q_norm", "scale"): "self_attn.q_norm.weight",
    ("attention", "k_norm", "scale"): "self_attn.k_norm.weight",
    ("attention", "router_q_proj", "kernel"): "self_attn.router_q_proj.0.weight",
    ("attention", "router_k_proj", "kernel"): "self_attn.router_k_proj.0.weight",
    # Not in the paper, hence a name of our own.
    ("attention", "router_beta"): "self_attn.router_beta",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "up", "kernel"): "mlp.up_proj.weight",
    ("mlp", "down", "kernel"): "mlp.down_proj.weight",
}


@dataclasses.dataclass(frozen=True)
class PublishedTensor:
    """Where one tensor of the published layout lives in an `MSATransformer`.

    Attributes:
      name: the published name.
      shape: the published shape.
      path: path of the parameter in `nnx.state(model)`.
      index: place on the parameter's leading axis of layers; None if it has none.
      transposed: the two are each other's transpose.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str | int, ...]
    index: int | None
    transposed: bool


def skeleton(
    config: MSAConfig,
    shardings: Shardings = Shardings(),  # noqa: B008
) -> tuple[nnx.GraphDef, list[tuple[tuple, nnx.Variable]]]:
    """Graph and parameters of a model, shapes only."""
    make = lambda: MSATransformer(config, rngs=nnx.Rngs(0), shardings=shardings)  # noqa: E731
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, nnx.to_flat_state(state)


@functools.cache
def published_tensors(config: MSAConfig) -> tuple[PublishedTensor, ...]:
    """Every parameter of a model of this config, one entry a published tensor."""
    tensors = []
    for path, variable in skeleton(config)[1]:
        shape, transposed = variable.shape, path[-1] == "kernel"
        if path[0] == "groups":
            _, first, count = config.layer_groups[path[1]]
            places = [(i, f"model.layers.{first + i}.{_LAYER[path[2:]]}") for i in range(count)]
            shape = shape[1:]
        else:
            places = [(None, _TOP[path])]
        shape = shape[::-1] if transposed else shape
        tensors += [PublishedTensor(name, shape, path, index, transposed) for index, name in places]
    return tuple(tensors)


def to_published(state: nnx.State, config: MSAConfig) -> dict[str, jax.Array]:
    """Parameters, or their gradients, by published name and in the published orientation.

    Args:
      state: `nnx.state(model)`, or a state of that structure.
      config: the model's.
    """
    flat = dict(nnx.to_flat_state(state))
    return {t.name: published_value(flat[t.path][...], t) for t in published_tensors(config)}


def published_value(value: jax.Array, tensor: PublishedTensor) -> jax.Array:
    """One published tensor out of a parameter's value."""
    value = value if tensor.index is None else value[tensor.index]
    return value.T if tensor.transposed else value


def published_config(config: MSAConfig) -> dict[str, Any]:
    """The `config.json` from which `MSAConfig.from_checkpoint` reads `config` back.

    But for how it runs: `remat`, `top_k_method` and its recall, `router_bias_scale`, `implementation`.
    """
    msa = dict(PUBLISHED_ONLY) | {
        "pooling_kernel_size": config.chunk_size,
        "top_k_docs": config.top_k,
        "router_layer_idx": ",".join(map(str, config.router_layers)),
        "jax_position_offset": config.position_offset,
        "jax_routing_score": config.routing_score,
        "jax_router_bias": config.router_bias,
        "jax_router_bias_init": config.router_bias_init,
        "jax_proportional_attention": config.proportional_attention,
        "jax_dtype": config.dtype,
    }
    return {
        "architectures": ["MSAForCausalLM"],
        "model_type": "msa",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "hidden_act": "silu",
        "torch_dtype": config.param_dtype,
        "msa_config": msa,
    }
