"""Settings of a run: what a file in `configs/` returns, as frozen dataclasses validated on construction."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from msa_jax.config import MSAConfig, of_today
from msa_jax.data.config import DataConfig, TokenizerConfig
from msa_jax.data.samples import LossWeights
from msa_jax.data.sources import field_types, names, owners, settings_type
from msa_jax.errors import ConfigError, require
from msa_jax.importing import require_extra
from msa_jax.sharding import MeshConfig
from msa_jax.training.config import OptimizerConfig, Phase, TrainingConfig

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Settings that stood elsewhere when runs were first written: where they were, and where they are.
_MOVED = {("tokenizer", "uuid_pairs"): ("data", "uuid_pairs")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a run is evaluated.

    Attributes:
      num_questions: questions asked of every memory. batch_size: questions asked together.
      mode: how documents are found: "generate", "constrained", "router" or "latent"; `eval.py --help` says what
        each does.
      max_rounds: how often a question may retrieve. max_new_tokens: tokens of each turn, and of the answer, at most.
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

    def __post_init__(self):
        for name in ("num_questions", "batch_size", "max_rounds", "max_new_tokens", "rows_per_step"):
            require(getattr(self, name) >= 1, f"evaluation.{name} must be at least 1, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run; `from_dict` takes what a file in `configs/` returns.

    Attributes:
      model: `preset`, a size by name, and changes to it, fields of `MSAConfig`; the vocabulary is the tokenizer's.
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
        values = as_named_today(values)
        try:
            run = cls(
                model=of_today(values.pop("model", {})),
                data=DataConfig.from_dict(values.pop("data", {})),
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
            if run.training.bag_of_words and not run.data.settings.lasting_documents:
                fitting = " or ".join(name for name in names() if settings_type(name).lasting_documents)
                raise ConfigError(
                    "training.bag_of_words weighs words by how many documents hold them, and data.source "
                    f"{run.data.source!r} makes its documents up; take {fitting}, or leave bag_of_words out."
                )
        return run

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"data": self.data.to_dict()}

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


def as_named_today(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run under the names that they have now, if they were written under earlier ones."""
    values = {part: dict(given) if isinstance(given, Mapping) else given for part, given in values.items()}
    for (old_part, old), (part, name) in _MOVED.items():
        if old in values.get(old_part, {}):
            values.setdefault(part, {}).setdefault(name, values[old_part].pop(old))
    return values


def _field(hint: Any, value: Any) -> Any:
    """A value that a flag can replace: None becomes a placeholder of the type in the hint."""
    if value is not None:
        return value
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    kinds = [typing.get_origin(o) or o for o in options if o is not types.NoneType]
    from ml_collections import config_dict

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


def _filled_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of the data and of all sources, so that another source can be chosen by flag."""
    filled = _filled(DataConfig, values)
    del filled["settings"]
    for name, sources in owners().items():
        kind = settings_type(sources[0])
        defaults = {settings_type(source).__dataclass_fields__[name].default for source in sources}
        filled[name] = _field(field_types(kind)[name], values.get(name, defaults.pop() if len(defaults) == 1 else None))
    return filled | {"loss_weights": dataclasses.asdict(LossWeights(**values.get("loss_weights", {})))}


def full_config(values: Mapping[str, Any]) -> ConfigDict:
    """Settings of a run with all their fields, so that each can be changed by flag; for files in `configs/`.

    Fields of the model that are not given stay unset, and are then the preset's.
    """
    require_extra("train")
    # Here, because a run that is read back needs no flags.
    from ml_collections import ConfigDict

    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(RunConfig)})
    if unknown:
        raise ConfigError(f"Run settings: unknown {unknown}.")
    values = as_named_today(values)
    training = values.get("training", {})
    filled = {
        "model": {"preset": "tiny"} | _filled(MSAConfig, values.get("model", {}), unset=True),
        "data": _filled_data(values.get("data", {})),
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
