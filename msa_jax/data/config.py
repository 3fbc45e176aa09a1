"""Settings of a run's data: a batch, the source it is drawn from, and the tokenizer, validated on construction."""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Mapping
from typing import Any, Literal, get_args

from msa_jax.data.episodes import SampleForm
from msa_jax.data.samples import LossWeights
from msa_jax.data.sources import SourceSettings, field_types, owners, settings_type
from msa_jax.data.templates import Template
from msa_jax.errors import require

_LOG = logging.getLogger(__name__)
_TEMPLATES = {"compact": Template.compact, "paper": Template.paper, "chinese": Template.chinese}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents and questions come from, and the shape of a batch.

    Attributes:
      source: a module of `msa_jax/data/sources`.
      settings: what that source alone needs to know; None for its defaults. In files and flags its fields stand beside
        these here: `data.num_words` is the `num_words` of "needles".
      document_len: tokens of a rendered document at most; longer texts are cut.
      row_len: W of packed rows; None for the documents' length, rounded up to whole chunks.
      num_documents: N of a training batch.
      num_questions: B of a training batch.
      question_len: T, tokens of a question with its whole reply.
      eval_fraction: share of questions and passages held out.
      loss_weights: of the tokens of a reply.
      samples: what one sample of a question is, see `render_episode`. "chain": its whole reply, with the one routing of
        the question. "at_once": one that names all documents before it reads them. "steps": one step of the chain at a
        time, as Memory Interleave asks it. "question": no reply, the router alone learns. "latent": one that reads no
        text and answers from pooled memory.
      unanswerable: share of samples whose supporting documents are hidden from them, and which learn to say so.
      label_fraction: share of samples whose relevant documents the auxiliary loss, and logged recall, know of.
    """

    source: str = "needles"
    settings: SourceSettings | None = None
    document_len: int = 64
    row_len: int | None = None
    num_documents: int = 64
    num_questions: int = 48
    question_len: int = 128
    eval_fraction: float = 0.1
    loss_weights: LossWeights = LossWeights()
    samples: SampleForm = "chain"
    unanswerable: float = 0.0
    label_fraction: float = 1.0

    def __post_init__(self):
        kind = settings_type(self.source)
        if self.settings is None:
            object.__setattr__(self, "settings", kind())
        require(isinstance(self.settings, kind), f"data.settings are not those of {self.source!r}: {self.settings}.")
        forms = get_args(SampleForm)
        require(self.samples in forms, f"data.samples must be one of {forms}, got {self.samples!r}.")
        require(0 <= self.unanswerable < 1, f"data.unanswerable must be a share in [0, 1), got {self.unanswerable}.")
        require(
            self.samples != "question" or not self.unanswerable,
            'data.samples "question" has no replies that could refuse: set data.unanswerable to 0.',
        )
        require(0 <= self.label_fraction <= 1, f"data.label_fraction must be in 0..1, got {self.label_fraction}.")
        for name in ("document_len", "num_documents", "num_questions", "question_len"):
            require(getattr(self, name) >= 1, f"data.{name} must be at least 1, got {getattr(self, name)}.")

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
