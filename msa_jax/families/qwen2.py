"""Qwen 2 and 2.5: biases of queries, keys and values, no norm of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msa_jax.families import rope, windows
from msa_jax.families.family import Family
from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec


def read(fields: Fields, num_layers: int) -> Sequence[LayerSpec]:
    fields.only("hidden_act", "silu")
    how = dict(qk_norm=False, qkv_bias=True) | rope.read(fields)
    return [LayerSpec(window=window, **how) for window in windows.read_qwen(fields, num_layers)]


def write(specs: Sequence[LayerSpec]) -> dict[str, Any]:
    return rope.write(specs[0]) | windows.write_qwen(specs) | {"hidden_act": "silu"}


FAMILY = Family(
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    defaults=dict(
        num_key_value_heads=32, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=32_768, sliding_window=4096,
        max_window_layers=28,
    ),
    read=read,
    write=write,
)  # fmt: skip
