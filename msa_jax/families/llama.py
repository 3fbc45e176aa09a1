"""Llama and what has its shape, such as SmolLM2."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from msa_jax.families.family import Family
from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec


def read(fields: Fields, rope: LayerSpec) -> Sequence[LayerSpec]:
    fields.only("hidden_act", "silu")
    bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    return [dataclasses.replace(rope, qk_norm=False, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)]


def write(specs: Sequence[LayerSpec]) -> dict[str, Any]:
    return {"attention_bias": specs[0].qkv_bias, "mlp_bias": specs[0].mlp_bias, "hidden_act": "silu"}


FAMILY = Family(
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    defaults=dict(rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048),
    read=read,
    write=write,
)
