"""Settings of a run's data: a batch, the source it is drawn from, and the tokenizer, validated on construction."""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Mapping
from typing import Any, Literal, get_args

from msa_jax.data.batch_config import BatchConfig
from msa_jax.data.samples import LossWeights
from msa_jax.data.sources import SourceSettings, field_types, owners, settings_type
from msa_jax.data.templates import Template
from msa_jax.errors import require

_LOG = logging.getLogger(__name__)
_TEMPLATES = {"compact": Template.compact, "paper": Template.paper, "chinese": Template.chinese}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(BatchConfig):
    """Where documents and questions come from, and the shape of a batch.

    Attributes:
      source: a module of `msa_jax/data/sources`.
      settings: what that source alone needs to know; None for its defaults. In files and flags its fields stand beside
        these here: `data.num_words` is the `num_words` of "needles".
    """

    source: str = "needles"
    settings: SourceSettings | None = None

    def __post_init__(self):
        super().__post_init__()
        kind = settings_type(self.source)
        if self.settings is None:
            object.__setattr__(self, "settings", kind())
        require(isinstance(self.settings, kind), f"data.settings are not those of {self.source!r}: {self.settings}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """Settings of a batch and of its source, side by side.

        Raises:
          ConfigError: a bad value, or one that must act for a setting that the source does not have.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        source = values.get("source", cls.source)
        kinds = field_types(settings_type(source))
        for name in sorted(values.keys() & owners().keys() - kinds.keys()):
            _pass_over(name, values.pop(name), source)
        settings = {}
        for name in kinds.keys() & values.keys():
            value = values.pop(name)
            # Where sources have different defaults, None leaves a setting at the source's.
            if value is not None or types.NoneType in get_args(kinds[name]):
                settings[name] = value
        if "loss_weights" in values:
            values["loss_weights"] = LossWeights(**values["loss_weights"])
        return cls(**values, settings=settings_type(source)(**settings))

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes."""
        values = dataclasses.asdict(self)
        return values | values.pop("settings")


def _pass_over(name: str, value: Any, source: str) -> None:
    """A setting of other sources: refused if it must not be passed over, else logged unless it is a default."""
    kinds = {other: settings_type(other) for other in owners()[name]}
    if value is None or value in [kind.__dataclass_fields__[name].default for kind in kinds.values()]:
        return
    said = f"data.{name} is a setting of {' and '.join(kinds)}, and does nothing with data.source {source!r}"
    require(not any(name in kind.must_act for kind in kinds.values()), f"{said}: leave it out, or take another source.")
    _LOG.warning("%s", said)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer trained on the run's texts, or a checkpoint's own.

    Attributes:
      vocab_size: tokens of a trained one, special ones included.
      path: folder of a tokenizer.json to use instead.
      template: "compact", "paper", "chinese", or a JSON file of one's own frames, which is read when the tokenizer is
        made and saved with it.
      numbers: "place" or "plain", how document numbers are spelt; empty leaves it to the template.
      id_digits: digits of document numbers; 0 leaves it to the template.
    """

    vocab_size: int = 4096
    path: str = ""
    template: str = "compact"
    numbers: Literal["", "place", "plain"] = ""
    id_digits: int = 0

    def __post_init__(self):
        require(
            self.template in _TEMPLATES or self.template.endswith(".json"),
            f"tokenizer.template must be {', '.join(_TEMPLATES)} or a .json file of frames, got {self.template!r}.",
        )
        numbers = get_args(field_types(type(self))["numbers"])
        require(self.numbers in numbers, f"tokenizer.numbers must be place, plain or empty, got {self.numbers!r}.")

    def make_template(self) -> Template:
        """The template named; raises DataError if it is a file and that is missing or damaged."""
        template = _TEMPLATES[self.template]() if self.template in _TEMPLATES else Template.load(self.template)
        return dataclasses.replace(
            template, numbers=self.numbers or template.numbers, id_digits=self.id_digits or template.id_digits
        )
