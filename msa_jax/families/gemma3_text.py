"""Gemma 3, text alone: windows in most layers, norms of `1 + w` also behind attention and MLP, scaled embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from msa_jax.families import rope, windows
from msa_jax.families.family import TENSORS, Family
from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec


def _ropes(fields: Fields) -> dict[str, dict[str, Any]]:
    """Of both kinds of layers; scaling as older files have it is of full attention alone."""
    both = fields.part("rope_parameters")
    if both is None:
        scaling = fields.part("rope_scaling")
        full = rope.read_object(scaling or Fields({}, fields.where), fields)
        return {windows.FULL: full, windows.SLIDING: dict(rope_theta=fields.number("rope_local_base_freq"))}
    thetas = {windows.FULL: "rope_theta", windows.SLIDING: "rope_local_base_freq"}
    parts = {kind: both.part(kind) or Fields({}, fields.where) for kind in thetas}
    both.refuse_the_rest()
    return {kind: rope.read_object(parts[kind], fields, theta) for kind, theta in thetas.items()}


def read(fields: Fields, num_layers: int) -> Sequence[LayerSpec]:
    for name in ("hidden_activation", "hidden_act"):
        fields.only(name, "gelu_pytorch_tanh")
    every = fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern") or 6
    fields.need(isinstance(every, int) and every > 0, "sliding_window_pattern", f"must be a number, is {every!r}")
    usual = [windows.SLIDING if (i + 1) % every else windows.FULL for i in range(num_layers)]
    bias, ropes = fields.flag("attention_bias"), _ropes(fields)
    how = dict(
        norm="rms_plus_one", post_norms=True, qkv_bias=bias, o_bias=bias, activation="gelu_tanh",
        query_scale=fields.number("query_pre_attn_scalar") ** -0.5,
    )  # fmt: skip
    return [
        LayerSpec(window=window, **how, **ropes[windows.FULL if window is None else windows.SLIDING])
        for window in windows.read(fields, fields.integer("sliding_window"), usual)
    ]


def write(specs: Sequence[LayerSpec]) -> dict[str, Any]:
    full = next((spec for spec in specs if spec.window is None), specs[0])
    near = next((spec for spec in specs if spec.window is not None), None)
    scalar = (full.query_scale or 1.0) ** -2
    fields = {"query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-9 else scalar}
    fields |= {"rope_local_base_freq": near.rope_theta} if near else {}
    fields |= {"attention_bias": full.qkv_bias, "hidden_activation": "gelu_pytorch_tanh"}
    kinds = [windows.FULL] * len(specs)  # said even where no layer has a window, which is not the default
    return rope.write(full) | {"layer_types": kinds} | windows.write(specs) | fields


FAMILY = Family(
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    defaults=dict(
        num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6, rope_theta=1e6, rope_local_base_freq=1e4,
        max_position_embeddings=131_072, sliding_window=4096, query_pre_attn_scalar=256, tie_word_embeddings=True,
    ),
    read=read,
    write=write,
    embedding_scale=math.sqrt,
    tensors=TENSORS | {
        ("attention_post_norm", "scale"): "post_attention_layernorm.weight",
        ("mlp_norm", "scale"): "pre_feedforward_layernorm.weight",
        ("mlp_post_norm", "scale"): "post_feedforward_layernorm.weight",
    },
)  # fmt: skip
