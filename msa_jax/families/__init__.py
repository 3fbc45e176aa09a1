"""Families of published checkpoints: `config.json` to the values of an `MSAConfig` and back, and names of tensors.

A file of this folder that has a `FAMILY` is a family; docs/backbones.md tells how to add one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pathlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from msa_jax.errors import ConfigError
from msa_jax.families import msa
from msa_jax.families.family import Family
from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec

# What is stored in another dtype (float16) is read as float32.
_DTYPES = ("float32", "bfloat16")
_SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "mlp_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
}  # fmt: skip


@functools.cache
def families() -> tuple[Family, ...]:
    """All there are, Qwen3 (MSA as published) first."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return tuple(sorted(found, key=lambda family: "msa" not in family.model_types))


def read_file(path: pathlib.Path) -> dict[str, Any]:
    """Values of an `MSAConfig` from a published `config.json`; raises ConfigError, see `read`."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise ConfigError(f"{path}: no such file; give a checkpoint folder with a config.json.") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not valid JSON ({e}).") from e
    return read(raw, str(path))


def read(raw: Any, where: str) -> dict[str, Any]:
    """Values of an `MSAConfig` from a published `config.json`.

    Args:
      raw: the parsed file.
      where: it stands, for messages.

    Raises:
      ConfigError: no family reads it, or a field is missing, unfit, or asks for what is not computed here.
    """
    kind = Fields(raw, where).get("model_type") or "msa"
    known = {name: family for family in families() for name in family.model_types}
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(
            f"{where}: model_type {kind!r} is not read here, only {', '.join(sorted(known))}; of a model of text and "
            "images give the text-only checkpoint."
        )
    family = known[kind]
    fields = Fields(raw, where, family.defaults)
    values = {ours: fields.integer(theirs) for theirs, ours in _SIZES.items()}
    heads = values["num_heads"]
    alone = fields.is_null("num_key_value_heads") or fields.get("num_key_value_heads") is None
    specs = tuple(family.read(fields, values["num_layers"]))
    theta = _theta(specs)
    values |= dict(
        num_kv_heads=heads if alone else fields.integer("num_key_value_heads"),
        head_dim=values["hidden_size"] // heads if fields.get("head_dim") is None else fields.integer("head_dim"),
        rope_theta=theta,
        norm_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        embedding_scale=family.embedding_scale(values["hidden_size"]),
        layer_specs=tuple(dataclasses.replace(s, rope_theta=None) if s.rope_theta == theta else s for s in specs),
    )
    # Files by Transformers 5 say `dtype`.
    stored = fields.get("torch_dtype") or fields.get("dtype")
    values["param_dtype"] = values["dtype"] = stored if stored in _DTYPES else "float32"
    values |= msa.read(fields.part("msa_config"), where, values["num_layers"])
    fields.refuse_the_rest()
    return values


def write(values: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` from which `read` makes `values` again, but for how a model runs.

    Args:
      values: fields of an `MSAConfig` by name.

    Raises:
      ConfigError: its layers are no family's.
    """
    specs = _whole(values)
    family = _found(specs, values["embedding_scale"], values["hidden_size"])
    return {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        **{theirs: values[ours] for theirs, ours in _SIZES.items()},
        "num_key_value_heads": values["num_kv_heads"],
        "head_dim": values["head_dim"],
        "rms_norm_eps": values["norm_eps"],
        "tie_word_embeddings": values["tie_embeddings"],
        **family.write(specs),
        "torch_dtype": values["param_dtype"],
        "msa_config": msa.write(values),
    }


def family_of(values: Mapping[str, Any]) -> Family:
    """The family that has layers as the `MSAConfig` of these values; raises ConfigError if none has."""
    return _found(_whole(values), values["embedding_scale"], values["hidden_size"])


def _theta(specs: Sequence[LayerSpec]) -> float:
    """The model's own: of the layers without a window, if there are any."""
    return next((spec for spec in specs if spec.window is None), specs[0]).rope_theta


def _whole(values: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Every layer, its theta written out."""
    specs = [values["layer_specs"][i % len(values["layer_specs"])] for i in range(values["num_layers"])]
    return tuple(dataclasses.replace(s, rope_theta=float(s.rope_theta or values["rope_theta"])) for s in specs)


@functools.cache
def _found(specs: tuple[LayerSpec, ...], scale: float, hidden_size: int) -> Family:
    for family in families():
        if family.embedding_scale(hidden_size) == scale:
            fields = Fields(family.write(specs), family.architecture, family.defaults)
            if tuple(family.read(fields, len(specs))) == specs:
                return family
    known = ", ".join(family.model_types[-1] for family in families())
    kinds = " and ".join(sorted({str(spec.to_dict()) for spec in specs}))
    raise ConfigError(f"A model with layers {kinds} is none of the families that can be saved: {known}.")
