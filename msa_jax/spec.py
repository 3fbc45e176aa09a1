"""What one decoder layer is: all in which model families differ, as data.

Layers read a `LayerSpec` and nothing asks for a family's name. A field is here only if it is computed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self

from msa_jax.errors import require


@functools.cache
def _choices(kind: type) -> dict[str, tuple]:
    """Fields whose type is a `Literal`, or one and None."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        parts = (hint,) if typing.get_origin(hint) is Literal else typing.get_args(hint)
        if any(typing.get_origin(part) is Literal for part in parts):
            found[name] = tuple(x for part in parts for x in typing.get_args(part) or (None,))
    return found


def require_choices(config: Any) -> None:
    """Raise ConfigError unless every field of a dataclass whose type is a `Literal` has one of its values."""
    for name, choices in _choices(type(config)).items():
        value = getattr(config, name)
        words = tuple(choice for choice in choices if choice is not None)
        fits = f"{'None or ' if None in choices else ''}one of {words}"
        require(value in choices, f"{name} must be {fits}, got {value!r}.")


def is_number(value: Any) -> bool:
    """A finite int or float; True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE is stretched beyond the length of the training.

    Attributes:
      kind: "linear" divides all frequencies by `factor`; "llama3" those of long waves, with a ramp between;
        "yarn" (arXiv 2309.00071) those that turn seldom within `original_length`, and sharpens the attention.
      factor: at least 1.
      original_length: tokens of the training; "llama3" and "yarn".
      low_freq_factor, high_freq_factor: "llama3": waves longer than `original_length / low_freq_factor` are divided,
        those shorter than `original_length / high_freq_factor` are left.
      beta_fast, beta_slow: "yarn": frequencies of more turns than `beta_fast` are left, of fewer than `beta_slow`
        divided.
      truncate: "yarn": the ramp begins and ends at whole dimensions.
      attention_factor: "yarn": multiplies queries and keys; None for `0.1 * log(factor) + 1`.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self):
        require_choices(self)
        require(is_number(self.factor) and self.factor >= 1, f"RoPE factor must be at least 1, got {self.factor!r}.")
        if self.kind != "linear":
            length = self.original_length
            require(
                isinstance(length, int) and length >= 1,
                f"RoPE scaling {self.kind!r} needs the length of the training in tokens, got {length!r}.",
            )
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            require(
                value is None or is_number(value) and value > 0, f"{name} of RoPE must be positive, got {value!r}."
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            require(getattr(self, low) < getattr(self, high), f"{low} of RoPE must be below its {high}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer. The default is Qwen3's.

    Attributes:
      norm: "rms" multiplies by its scale, "rms_plus_one" by 1 + its scale (Gemma).
      qk_norm: queries and keys are normalised per head, before RoPE.
      post_norms: what attention and MLP give is normalised before it is added to the stream (Gemma).
      qkv_bias, o_bias, mlp_bias: the projections of queries, keys and values, that of the attention's output, and
        those of the MLP add a bias.
      activation: of the MLP's gate.
      window: a token attends to itself and the `window - 1` tokens before it; None for all of them. What a router layer
        reads of the memory is in no window.
      rope_theta: base of RoPE; None for the model's.
      rope_scaling: None for plain RoPE.
      query_scale: multiplies the logits of attention; None for `1 / sqrt(D)`.
    """

    norm: Literal["rms", "rms_plus_one"] = "rms"
    qk_norm: bool = True
    post_norms: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    window: int | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    query_scale: float | None = None

    def __post_init__(self):
        require_choices(self)
        for name in ("qk_norm", "post_norms", "qkv_bias", "o_bias", "mlp_bias"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} of a layer must be true or false, got {value!r}.")
        for name in ("window", "rope_theta", "query_scale"):
            value = getattr(self, name)
            fits = value is None or is_number(value) and value > 0 and (name != "window" or isinstance(value, int))
            require(fits, f"{name} of a layer must be positive, got {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """What differs from the default, for JSON: a field that comes later leaves what was written before as it is."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {name: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for name, v in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict` output; unknown names raise `ConfigError`."""
        values = dict(values)
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        require(not unknown, f"Layers have settings unknown to this version: {unknown}.")
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return cls(**values)


DEFAULT = LayerSpec()
