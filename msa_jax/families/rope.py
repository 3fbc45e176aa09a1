"""RoPE of a `config.json`: `rope_theta` and `rope_scaling`, or the `rope_parameters` of transformers 5."""

from __future__ import annotations

from typing import Any

from msa_jax.errors import ConfigError
from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec, RopeScaling


def read(fields: Fields) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a `LayerSpec`; all layers have the same."""
    old, new = fields.part("rope_scaling"), fields.part("rope_parameters")
    given = new or old
    if given is None:
        return dict(rope_theta=fields.number("rope_theta"), rope_scaling=None)
    found = read_object(given, fields)
    if old and new:
        alike = found["rope_scaling"] == scaling_of(old, fields)
        fields.need(alike, "rope_scaling", "and rope_parameters say different things: remove one of them")
    return found


def read_object(rope: Fields, fields: Fields, theta: str = "rope_theta") -> dict[str, Any]:
    """The same of one object of a file; `theta` is the field of the file that has it where the object has none."""
    own = rope.get("rope_theta") is not None
    found = rope.number("rope_theta") if own else fields.number(theta)
    return dict(rope_theta=found, rope_scaling=scaling_of(rope, fields))


def scaling_of(rope: Fields, fields: Fields) -> RopeScaling | None:
    """How RoPE is stretched, by an object of `fields` that says so."""
    kinds = [rope.get(name) for name in ("rope_type", "type")]
    kind = kinds[0] or kinds[1] or "default"
    rope.get("rope_theta")  # read by others
    if kind == "default":
        rope.refuse_the_rest()
        return None
    known = ("linear", "llama3", "yarn")
    rope.need(kind in known, "rope_type", f"is {kind!r}, need default or one of {known}: no other is computed here")
    values = dict(kind=kind, factor=rope.number("factor"))
    if kind != "linear":
        name = "original_max_position_embeddings"
        given = rope if rope.get(name) is not None else fields
        name = name if given is rope or fields.get(name) is not None else "max_position_embeddings"
        values["original_length"] = given.integer(name)
    if kind == "llama3":
        values |= {name: rope.number(name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        optional = ("beta_fast", "beta_slow", "attention_factor")
        values |= {name: rope.number(name) for name in optional if rope.get(name) is not None}
        values["truncate"] = rope.get("truncate") is None or rope.flag("truncate")
    rope.refuse_the_rest()
    try:
        return RopeScaling(**values)
    except ConfigError as e:
        raise ConfigError(f"{rope.where}: {rope.within.rstrip('.')}: {e}") from e


def write(spec: LayerSpec) -> dict[str, Any]:
    """What `read` reads back, in the form that both older and newer programs know."""
    theta, scaling = spec.rope_theta, spec.rope_scaling
    if scaling is None:
        return {"rope_theta": theta}
    values = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_length
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow", "truncate")}
    values |= {name: getattr(scaling, name) for name in names.get(scaling.kind, ())}
    if scaling.attention_factor is not None:
        values["attention_factor"] = scaling.attention_factor
    return {"rope_theta": theta, "rope_scaling": values}
