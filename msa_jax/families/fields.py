"""Fields of a `config.json`, checked as they are read; what nobody read and is not known to be harmless is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msa_jax.errors import require
from msa_jax.spec import is_number

# What a config.json says beside the computation of logits: bookkeeping, training, other programs' settings.
HARMLESS = frozenset(
    "_attn_implementation _name_or_path architectures attention_dropout attn_implementation auto_map "
    "cache_implementation do_sample dtype hidden_dropout id2label initializer_range is_llama_config label2id "
    "max_position_embeddings max_window_layers model_type num_labels original_max_position_embeddings pretraining_tp "
    "problem_type resid_pdrop return_dict rope_theta task_specific_params temperature tokenizer_class top_p "
    "torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache".split()
)
# Harmless with this value alone.
NEUTRAL = {"partial_rotary_factor": 1}


class Fields:
    """The fields of one JSON object.

    Args:
      raw: the object.
      where: it stands, for messages.
      defaults: what the family takes for a field that is absent or null.
      within: the name of the object in the file, with a dot; empty for the file itself.

    Raises:
      ConfigError: in every method, with the name of the field that is missing, unfit or not computed.
    """

    def __init__(self, raw: Any, where: str, defaults: Mapping[str, Any] | None = None, *, within: str = ""):
        what = f"{within.rstrip('.')} must be an object" if within else "must hold a JSON object"
        require(isinstance(raw, dict), f"{where}: {what}, not {raw!r:.40}.")
        self.where, self.within = where, within
        self._raw, self._defaults, self._read = raw, defaults or {}, set()

    def get(self, name: str) -> Any:
        """As it stands, or the default; None for a field that has neither."""
        self._read.add(name)
        value = self._raw.get(name)
        return self._defaults.get(name) if value is None else value

    def is_null(self, name: str) -> bool:
        """It is there, and null."""
        return name in self._raw and self._raw[name] is None

    def integer(self, name: str, least: int = 1) -> int:
        value = self.get(name)
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        self.need(fits, name, f"must be an integer of at least {least}, is {value!r}")
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        self.need(is_number(value) and value > 0, name, f"must be a positive number, is {value!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        """False if absent without a default."""
        value = self.get(name)
        self.need(value in (None, True, False), name, f"must be true or false, is {value!r}")
        return bool(value)

    def only(self, name: str, *computed: Any) -> None:
        """The field, if it is there, has one of the values that are computed."""
        value = self.get(name)
        wanted = " or ".join(map(repr, computed))
        self.need(value is None or value in computed, name, f"is {value!r}, need {wanted}: no other is computed here")

    def part(self, name: str) -> Fields | None:
        """A nested object; None if it is absent or null."""
        value = self.get(name)
        return None if value is None else Fields(value, self.where, within=f"{self.within}{name}.")

    def starting(self, prefix: str) -> dict[str, Any]:
        """All fields whose names begin so."""
        return {name: value for name, value in self._raw.items() if name.startswith(prefix)}

    def need(self, condition: bool, name: str, message: str) -> None:
        """Raise, about the field `name`, unless the condition holds."""
        require(condition, f"{self.where}: {self.within}{name} {message}.")

    def refuse_the_rest(self) -> None:
        """What has not been read might change the computation, unless it is known not to, or says nothing."""
        for name, value in self._raw.items():
            known = name in self._read or name in HARMLESS or name.endswith("_token_id") or name.startswith("output_")
            off = value is None or value is False or value in ("", [], {})
            fits = known or off or name in NEUTRAL and value == NEUTRAL[name]
            self.need(fits, name, f"{value!r} is not computed here; remove it if it changes no output")
