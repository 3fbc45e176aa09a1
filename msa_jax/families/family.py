"""What a model family states: one file a family makes one of these."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec

# Of the usual decoder: by the path of a parameter in the model, of a layer after its number.
TENSORS = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("lm_head", "kernel"): "lm_head.weight",
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("attention", "q_norm", "scale"): "self_attn.q_norm.weight",
    ("attention", "k_norm", "scale"): "self_attn.k_norm.weight",
    ("attention", "router_q_proj", "kernel"): "self_attn.router_q_proj.0.weight",
    ("attention", "router_k_proj", "kernel"): "self_attn.router_k_proj.0.weight",
    # Not in the paper, hence a name of our own.
    ("attention", "router_beta"): "self_attn.router_beta",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
} | {
    (part, ours, leaf): f"{theirs}.{suffix}"
    for part, ours, theirs in (
        *(("attention", f"{x}_proj", f"self_attn.{x}_proj") for x in "qkvo"),
        *(("mlp", name, f"mlp.{name}_proj") for name in ("gate", "up", "down")),
    )
    for leaf, suffix in (("kernel", "weight"), ("bias", "bias"))
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of published checkpoints.

    Attributes:
      model_types: `model_type` of the config.json files that it reads; it writes the first.
      architecture: the name that it writes.
      defaults: what a field that is absent or null means.
      read: the layers of a config.json, each with its theta, given the fields and how many layers there are.
      write: the fields from which `read` makes such layers; `families` finds out whether it does.
      embedding_scale: given the hidden size.
      tensors: published names by path of the parameter.
    """

    model_types: tuple[str, ...]
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields, int], Sequence[LayerSpec]]
    write: Callable[[Sequence[LayerSpec]], dict[str, Any]]
    embedding_scale: Callable[[int], float] = lambda hidden_size: 1.0
    tensors: Mapping[tuple[str, ...], str] = dataclasses.field(default_factory=lambda: TENSORS)
