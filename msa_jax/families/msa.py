"""`msa_config`: what a published MSA checkpoint says beside its backbone's own fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msa_jax.errors import ConfigError
from msa_jax.families.fields import Fields

# Tokens of the template prefix `<|im_start|>user\n` under the published tokenizer.
TEMPLATE_LEN = 3
# Settings that choose between forms, and the form that is computed here.
ONLY = (
    ("chunk_reduce_method", "max"), ("decouple_pooling_mode", "mean"), ("head_reduce_method", "mean"),
    ("query_reduce_method", "max"), ("decouple_router", True), ("rewrite_position", True),
)  # fmt: skip
# What the published form has no name for is written under a prefix.
_PREFIX = "jax_"
_OURS = (
    "position_offset", "routing_score", "router_bias", "router_bias_init", "proportional_attention", "dtype",
)  # fmt: skip


def read(fields: Fields | None, where: str, num_layers: int) -> dict[str, Any]:
    """Values of an `MSAConfig`; `fields` is None for a backbone without a router."""
    msa = fields or Fields({}, where, within="msa_config.")
    for name, only in ONLY:
        msa.only(name, only)
    k = 16 if msa.get("top_k_docs") is None else msa.integer("top_k_docs")
    layers = msa.get("router_layer_idx")
    if layers == "all":
        layers = range(num_layers)
    elif isinstance(layers, str):
        layers = [i for i in layers.split(",") if i.strip()]
    try:
        layers = tuple(sorted({int(i) for i in layers or ()})) or None
    except (TypeError, ValueError) as e:
        raise ConfigError(
            f"{where}: msa_config.router_layer_idx must be 'all' or layers like '2,3', is {layers!r}."
        ) from e
    return dict(
        chunk_size=64 if msa.get("pooling_kernel_size") is None else msa.integer("pooling_kernel_size"),
        top_k_documents=k,
        position_offset=TEMPLATE_LEN + k,
        router_layers=layers,
    ) | {name.removeprefix(_PREFIX): value for name, value in msa.starting(_PREFIX).items()}


def write(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `read` reads back, but for how a model runs."""
    return dict(ONLY) | {
        "pooling_kernel_size": values["chunk_size"],
        "top_k_docs": values["top_k_documents"],
        "router_layer_idx": ",".join(map(str, values["router_layers"])),
    } | {_PREFIX + name: values[name] for name in _OURS}  # fmt: skip
