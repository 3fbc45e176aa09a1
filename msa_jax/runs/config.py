"""Settings of a run: what a file in `configs/` returns, as frozen dataclasses validated on construction."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict, config_dict

from msa_jax.errors import ConfigError
from msa_jax.config import MSAConfig, of_today
from msa_jax.data import LossWeights, Template
from msa_jax.data.episodes import SAMPLE_FORMS, SampleForm
from msa_jax.data.sources.ruler_tasks import TASKS, check_tasks
from msa_jax.sharding import MeshConfig
from msa_jax.training.config import OptimizerConfig, Phase, TrainingConfig

_TEMPLATES = {"compact": Template.compact, "paper": Template.paper, "chinese": Template.chinese}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents and questions come from, and the shape of a batch.

    Attributes:
      source: "needles" in real text, "ruler" (RULER's needle tasks), "python_docs" (documentation of this Python
        installation), "jsonl", or "babi".
      folder: of documents.jsonl, for "jsonl"; for "needles" and "ruler" the haystack, empty for Python's documentation.
        Several, parted by commas, are one corpus. For "babi" of its files.
      babi_tasks: numbers of bAbI's tasks.
      titles: every text begins with its title; for "python_docs" and "jsonl".
      pair_fraction, hidden_fraction: of "jsonl", see `JsonlSource`.
      hard_negatives: file of documents mistaken for what questions ask for (`msa_jax.evaluation.mine`); a batch holds
        num_negatives of them for each question that the file knows.
      packages: installed distributions whose documentation is read too; None reads all.
      include_sources: read their source code too. max_chars: stop reading after so many characters.
      document_len: tokens of a rendered document at most; longer texts are cut.
      row_len: W of packed rows; default the documents' length, rounded up to whole chunks.
      num_documents, num_questions: N and B of a training batch.
      question_len: T, tokens of a question with its whole reply.
      num_words: words that needle keys are made of. key_format: how, each word's name in braces.
      hard_fraction, needle_fraction: see `NeedleSource`, `RulerSource`.
      ruler_tasks: RULER's tasks that "ruler" asks; a memory that eval.py makes is of one task.
      eval_fraction: share of questions and passages held out.
      loss_weights: of ids, answers and quoted ids; see `LossWeights`.
      samples: "chain" trains on a question's whole reply with the one routing of the question, "at_once" on one that
        names all documents before it reads them, "steps" on one step of the chain at a time, as Memory Interleave
        asks it, "question" on its router alone, "latent" on one that reads no text and answers from pooled memory.
        unanswerable: share of samples whose supporting documents are hidden from them, and which learn to say so.
        label_fraction: share of samples whose relevant documents the auxiliary loss, and logged recall, know of. See
        `render_episode`.
    """

    source: Literal["needles", "ruler", "python_docs", "jsonl", "babi"] = "needles"
    folder: str = ""
    titles: bool = False
    pair_fraction: float = 0.0
    hidden_fraction: float = 1.0
    hard_negatives: str = ""
    num_negatives: int = 1
    babi_tasks: tuple[int, ...] = (1, 2)
    packages: tuple[str, ...] | None = ()
    include_sources: bool = False
    max_chars: int | None = None
    document_len: int = 64
    row_len: int | None = None
    num_documents: int = 64
    num_questions: int = 48
    question_len: int = 128
    num_words: int = 256
    key_format: str = "{a}-{n}"
    ruler_tasks: tuple[str, ...] = tuple(TASKS)
    hard_fraction: float = 0.75
    needle_fraction: float = 1.0
    eval_fraction: float = 0.1
    loss_weights: LossWeights = LossWeights()
    samples: SampleForm = "chain"
    unanswerable: float = 0.0
    label_fraction: float = 1.0

    def __post_init__(self):
        if self.source not in ("needles", "ruler", "python_docs", "jsonl", "babi"):
            raise ConfigError(f"data.source must be needles, ruler, python_docs, jsonl or babi, got {self.source!r}.")
        if self.source == "babi" and not (self.folder and self.babi_tasks):
            raise ConfigError('data.source "babi" needs data.folder, with its qa1_*_train.txt, and data.babi_tasks.')
        check_tasks(self.ruler_tasks)
        if self.source == "jsonl" and not self.folders:
            raise ConfigError('data.source "jsonl" needs data.folder, a folder with a documents.jsonl.')
        if self.samples not in SAMPLE_FORMS:
            raise ConfigError(f"data.samples must be one of {SAMPLE_FORMS}, got {self.samples!r}.")
        if not 0 <= self.unanswerable < 1:
            raise ConfigError(f"data.unanswerable must be a share in [0, 1), got {self.unanswerable}.")
        if self.hard_negatives and self.source in ("needles", "ruler"):
            raise ConfigError("data.hard_negatives is for documents that stay; needles have data.hard_fraction.")
        if self.samples == "question" and self.unanswerable:
            raise ConfigError('data.samples "question" has no replies that could refuse: set data.unanswerable to 0.')
        if not 0 <= self.label_fraction <= 1:
            raise ConfigError(f"data.label_fraction must be in 0..1, got {self.label_fraction}.")
        for name in ("document_len", "num_documents", "num_questions", "question_len", "num_negatives"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}.")
        if not (0 <= self.pair_fraction < 1 and 0 <= self.hidden_fraction <= 1):
            raise ConfigError(
                "data.pair_fraction must lie in [0, 1) and data.hidden_fraction in [0, 1], got "
                f"{self.pair_fraction} and {self.hidden_fraction}."
            )

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.folder.split(",") if name.strip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer trained on the run's texts, or a checkpoint's own.

    Attributes:
      vocab_size: of a trained one, special tokens included. uuid_pairs: it cuts uuids into pairs of digits; see
        `Tokenizer.train`.
      path: folder of a tokenizer.json to use instead.
      template: "compact", "paper", "chinese", or a JSON file of one's own frames, which is read when the tokenizer is
        made and saved with it. numbers: "place" or "plain", how document numbers are spelt; empty leaves it to the
        template. id_digits: of document numbers; 0 leaves it to the template.
    """

    vocab_size: int = 4096
    uuid_pairs: bool = False
    path: str = ""
    template: str = "compact"
    numbers: Literal["", "place", "plain"] = ""
    id_digits: int = 0

    def __post_init__(self):
        if self.template not in _TEMPLATES and not self.template.endswith(".json"):
            raise ConfigError(
                f"tokenizer.template must be {', '.join(_TEMPLATES)} or a .json file of frames, got {self.template!r}."
            )
        if self.numbers not in ("", "place", "plain"):
            raise ConfigError(f"tokenizer.numbers must be place, plain or empty, got {self.numbers!r}.")

    def make_template(self) -> Template:
        """The template named; raises DataError if it is a file and that is missing or damaged."""
        template = _TEMPLATES[self.template]() if self.template in _TEMPLATES else Template.load(self.template)
        return dataclasses.replace(
            template, numbers=self.numbers or template.numbers, id_digits=self.id_digits or template.id_digits
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a run is evaluated.

    Attributes:
      num_questions: asked of every memory. batch_size: asked together.
      mode: of asking, as `AskConfig.mode`.
      max_rounds: how often a question may retrieve. max_new_tokens: of each turn, and of the answer.
      rows_per_step: packed rows that are encoded together.
      seed: of memories and questions.
    """

    num_questions: int = 128
    batch_size: int = 64
    mode: str = "generate"
    max_rounds: int = 2
    max_new_tokens: int = 24
    rows_per_step: int = 128
    seed: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run; `from_dict` takes what a file in `configs/` returns.

    Attributes:
      model: preset name and changes for `MSAConfig`; the vocabulary is the tokenizer's.
      init_from: folder of a published checkpoint to start from, instead of random parameters.
      mesh: devices of training; a run may go on with another mesh.
    """

    model: Mapping[str, Any]
    data: DataConfig
    tokenizer: TokenizerConfig
    training: TrainingConfig
    evaluation: EvalConfig
    init_from: str = ""
    mesh: MeshConfig = MeshConfig()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Validate nested plain mappings; unknown names and bad values raise `ConfigError`."""
        values = dict(values)
        try:
            data = dict(values.pop("data", {}))
            if "loss_weights" in data:
                data["loss_weights"] = LossWeights(**data["loss_weights"])
            for name in ("packages", "ruler_tasks", "babi_tasks"):
                if data.get(name) is not None:
                    data[name] = tuple(data[name])
            run = cls(
                model=of_today(values.pop("model", {})),
                data=DataConfig(**data),
                tokenizer=TokenizerConfig(**dict(values.pop("tokenizer", {}))),
                training=TrainingConfig.from_dict(values.pop("training")),
                evaluation=EvalConfig(**dict(values.pop("evaluation", {}))),
                mesh=MeshConfig(**dict(values.pop("mesh", {}))),
                **values,
            )
        except (TypeError, KeyError) as e:
            raise ConfigError(f"Run settings: {e}.") from e
        if run.data.samples == "question" and any(phase.lm_weight for phase in run.training.phases):
            raise ConfigError('data.samples "question" has no replies to learn: set lm_weight of every phase to 0.')
        if not run.init_from:  # a run that is trained needs that folder no more
            layers = run.model_config(vocab_size=8).router_layers
            if run.training.bag_of_words and layers[0] == 0:
                raise ConfigError(
                    "training.bag_of_words sums a question's words in the layer below the first router layer, and "
                    f"model.router_layers {layers} begin with layer 0; begin with 1, or leave bag_of_words out."
                )
            if run.training.bag_of_words and run.data.source not in ("jsonl", "python_docs"):
                raise ConfigError(
                    "training.bag_of_words weighs words by how many documents hold them, and data.source "
                    f"{run.data.source!r} makes its documents up; take jsonl or python_docs, or leave bag_of_words out."
                )
        return run

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def model_config(self, vocab_size: int) -> MSAConfig:
        changes = {name: value for name, value in self.model.items() if value is not None}
        if self.init_from:
            changes.pop("preset", None)
            return MSAConfig.from_checkpoint(self.init_from, **changes)
        if changes.get("router_layers") is not None:
            changes["router_layers"] = tuple(changes["router_layers"])
        try:
            return MSAConfig.preset(changes.pop("preset", "tiny"), **(changes | {"vocab_size": vocab_size}))
        except TypeError as e:
            raise ConfigError(f"Model settings: {e}.") from e

    def row_len(self, chunk_size: int) -> int:
        return self.data.row_len or -(-self.data.document_len // chunk_size) * chunk_size


def _field(hint: Any, value: Any) -> Any:
    """A value that a flag can replace: None becomes a placeholder of the type in the hint."""
    if value is not None:
        return value
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    kinds = [typing.get_origin(o) or o for o in options if o is not types.NoneType]
    return config_dict.placeholder(str if kinds[0] is Literal else kinds[0])


def _filled(kind: type, values: Mapping[str, Any], *, unset: bool = False) -> dict[str, Any]:
    """Every field of a dataclass: as given, else its default; with `unset`, else a placeholder of its type."""
    hints = typing.get_type_hints(kind)
    given = dict(values)
    fields = {}
    for field in dataclasses.fields(kind):
        default = None if unset or field.default is dataclasses.MISSING else field.default
        fields[field.name] = _field(hints[field.name], given.pop(field.name, default))
    return fields | given


def full_config(values: Mapping[str, Any]) -> ConfigDict:
    """Settings of a run with all their fields, so that each can be changed by flag; for files in `configs/`.

    Fields of the model that are not given stay unset, and are then the preset's.
    """
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(RunConfig)})
    if unknown:
        raise ConfigError(f"Run settings: unknown {unknown}.")
    values = {name: dict(part) if isinstance(part, Mapping) else part for name, part in values.items()}
    training = values.get("training", {})
    data = values.get("data", {})
    filled = {
        "model": {"preset": "tiny"} | _filled(MSAConfig, values.get("model", {}), unset=True),
        "data": _filled(DataConfig, data)
        | {"loss_weights": dataclasses.asdict(LossWeights(**data.get("loss_weights", {})))},
        "tokenizer": _filled(TokenizerConfig, values.get("tokenizer", {})),
        "training": _filled(TrainingConfig, training)
        | {
            "phases": [_filled(Phase, phase) for phase in training.get("phases", [])],
            "optimizer": _filled(OptimizerConfig, training.get("optimizer", {})),
        },
        "evaluation": _filled(EvalConfig, values.get("evaluation", {})),
        "init_from": values.get("init_from", ""),
        "mesh": _filled(MeshConfig, values.get("mesh", {})),
    }
    del filled["model"]["vocab_size"], filled["model"]["layer_specs"]  # the tokenizer's, and a checkpoint's
    return ConfigDict(filled)
