"""Llama and what has its shape, such as SmolLM2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msa_jax.families import rope
from msa_jax.families.family import Family
from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec


def read(fields: Fields, num_layers: int) -> Sequence[LayerSpec]:
    fields.only("hidden_act", "silu")
    bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    return [LayerSpec(qk_norm=False, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, **rope.read(fields))] * num_layers


def write(specs: Sequence[LayerSpec]) -> dict[str, Any]:
    one = specs[0]
    return rope.write(one) | {"attention_bias": one.qkv_bias, "mlp_bias": one.mlp_bias, "hidden_act": "silu"}


FAMILY = Family(
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    defaults=dict(rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048),
    read=read,
    write=write,
)
