"""Mistral: every layer has the window, unless it is null."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msa_jax.families import rope, windows
from msa_jax.families.family import Family
from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec


def read(fields: Fields, num_layers: int) -> Sequence[LayerSpec]:
    fields.only("hidden_act", "silu")
    window = None if fields.is_null("sliding_window") else fields.integer("sliding_window")
    kind = windows.FULL if window is None else windows.SLIDING
    how = dict(qk_norm=False) | rope.read(fields)
    return [LayerSpec(window=window, **how) for window in windows.read(fields, window, [kind] * num_layers)]


def write(specs: Sequence[LayerSpec]) -> dict[str, Any]:
    return rope.write(specs[0]) | {"sliding_window": specs[0].window, "hidden_act": "silu"}


FAMILY = Family(
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    defaults=dict(
        num_key_value_heads=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=131_072, sliding_window=4096
    ),
    read=read,
    write=write,
)
