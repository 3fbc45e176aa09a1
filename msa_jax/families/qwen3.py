"""Qwen3, and MSA as published, which has it as its backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msa_jax.families import rope, windows
from msa_jax.families.family import Family
from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec


def read(fields: Fields, num_layers: int) -> Sequence[LayerSpec]:
    fields.only("hidden_act", "silu")
    bias = fields.flag("attention_bias")
    how = dict(qk_norm=True, qkv_bias=bias, o_bias=bias) | rope.read(fields)
    return [LayerSpec(window=window, **how) for window in windows.read_qwen(fields, num_layers)]


def write(specs: Sequence[LayerSpec]) -> dict[str, Any]:
    one = specs[0]
    return rope.write(one) | windows.write_qwen(specs) | {"attention_bias": one.qkv_bias, "hidden_act": "silu"}


FAMILY = Family(
    model_types=("msa", "qwen3"),
    architecture="MSAForCausalLM",
    defaults=dict(
        num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=32_768,
        sliding_window=4096, max_window_layers=28,
    ),
    read=read,
    write=write,
)  # fmt: skip
