"""Qwen3, and MSA as published, which has it as its backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from msa_jax.families.family import Family
from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec


def read(fields: Fields, rope: LayerSpec) -> Sequence[LayerSpec]:
    fields.only("hidden_act", "silu")
    fields.need(not fields.flag("use_sliding_window"), "use_sliding_window", "is true: no window is computed here")
    fields.get("sliding_window")  # it says nothing without the flag
    for kind in fields.get("layer_types") or ():
        fields.need(kind == "full_attention", "layer_types", f"has {kind!r}, need 'full_attention' alone")
    bias = fields.flag("attention_bias")
    return [dataclasses.replace(rope, qk_norm=True, qkv_bias=bias, o_bias=bias)]


def write(specs: Sequence[LayerSpec]) -> dict[str, Any]:
    return {"attention_bias": specs[0].qkv_bias, "hidden_act": "silu"}


FAMILY = Family(
    model_types=("msa", "qwen3"),
    architecture="MSAForCausalLM",
    defaults=dict(
        num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=32_768
    ),
    read=read,
    write=write,
)
