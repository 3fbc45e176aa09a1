"""Settings of a training run: frozen dataclasses, validated on construction."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from msa_jax.errors import ConfigError, require

AuxLoss = Literal["infonce", "infonce_decoupled", "infonce_focal", "infonce_decoupled_focal"]
Optimizer = Literal["adamw", "muon"]
Decay = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with its own loss weights (paper section 3.4: warm-up, then main).

    Attributes:
      steps: optimiser steps.
      lm_weight: of the language-model loss. aux_weight: of the auxiliary loss, beside it.
      lr_scale: learning rate of the phase, relative to the optimiser's.
      mean_over_tokens: score documents by the mean over routing tokens, not the max.
      recent: batches before this one whose documents stay in memory, without gradient (`training.recent`): the bank
        has (1 + recent) * num_documents documents. Phases with ever more of them grow it.
    """

    steps: int
    lm_weight: float = 1.0
    aux_weight: float = 0.1
    lr_scale: float = 1.0
    mean_over_tokens: bool = False
    recent: int = 0

    def __post_init__(self):
        require(self.recent >= 0, f"phase.recent must not be negative, got {self.recent}.")
        require(self.steps >= 0, f"phase.steps must not be negative, got {self.steps}.")
        require(
            self.lm_weight >= 0 and self.aux_weight >= 0 and self.lr_scale >= 0,
            f"lm_weight, aux_weight and lr_scale must not be negative, got {self}.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimiser and learning-rate schedule.

    Attributes:
      name: "adamw", or "muon" (matrices by Muon, all else by Adam).
      learning_rate: peak rate of AdamW, or of Muon's matrices.
      adam_learning_rate: peak rate of what Muon leaves to Adam.
      warmup_steps: linear warm-up from 0.
      decay: from the peak, over all steps that follow: "constant", "linear" or "cosine".
      final_fraction: the rate at the last step, relative to the peak.
      b1, b2: decay of Adam's two moments. weight_decay: decoupled, on matrices only.
      clip_norm: global norm at which gradients are clipped.
      accumulate: batches whose gradients are averaged into one step.
      ema_decay: decay of an exponential moving average of the parameters, which evaluation then uses; 0 is off.
    """

    name: Optimizer = "adamw"
    learning_rate: float = 1e-4
    adam_learning_rate: float = 2e-3
    warmup_steps: int = 30
    decay: Decay = "cosine"
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.0

    def __post_init__(self):
        for name, choices in (("name", get_args(Optimizer)), ("decay", get_args(Decay))):
            value = getattr(self, name)
            require(value in choices, f"optimizer.{name} must be one of {choices}, got {value!r}.")
        for name in ("learning_rate", "adam_learning_rate", "clip_norm"):
            require(getattr(self, name) > 0, f"optimizer.{name} must be positive, got {getattr(self, name)}.")
        for name in ("b1", "b2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}.")
        require(self.accumulate >= 1, f"optimizer.accumulate must be at least 1, got {self.accumulate}.")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps must not be negative, got {self.warmup_steps}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What a training run does, beyond its model and data.

    Attributes:
      phases: run one after the other.
      optimizer: see `OptimizerConfig`.
      aux_loss: auxiliary loss on document scores. temperature: its tau. gamma: exponent of its focal forms.
      embedding_std: start from a residual stream that holds embeddings of this standard deviation alone; 0 keeps the
        random start.
      logit_scale: the final norm's scale at that start.
      tied_router: start W_QR as W_KR, repeated over each group, so that equal hidden states match.
      bag_of_words: start the router as one that compares bags of rare words, see `msa_jax.training.bag_of_words`;
        in place of `tied_router`, on top of `embedding_std`, with a layer below the first router layer.
      copy_scale: start the value and output projections of router layers as a circuit that copies what is
        attended to into the residual stream, at this scale; 0 keeps the random start.
      max_targets: the most tokens of one sample that carry loss, so that only those pass the vocabulary
        projection; None projects every token. A batch with more is an error.
      max_routing: the most tokens of one sample that route, so that only those are scored; None scores every token.
        A batch with more is an error.
      seed: of parameters and data.
      log_every: steps from one line of metrics to the next. checkpoint_every: steps from one checkpoint to the next.
      keep_checkpoints: how many checkpoints stay.
    """

    phases: tuple[Phase, ...]
    optimizer: OptimizerConfig = OptimizerConfig()
    aux_loss: AuxLoss = "infonce_decoupled"
    temperature: float = 0.1
    gamma: float = 2.0
    embedding_std: float = 0.0
    logit_scale: float = 1.0
    tied_router: bool = False
    bag_of_words: bool = False
    copy_scale: float = 0.0
    max_targets: int | None = None
    max_routing: int | None = None
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self):
        losses = get_args(AuxLoss)
        require(self.aux_loss in losses, f"aux_loss must be one of {losses}, got {self.aux_loss!r}.")
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}.")
        require(
            not self.bag_of_words or (self.embedding_std > 0 and not self.tied_router),
            "bag_of_words ties the router itself and weighs the embeddings of embedding_std: "
            "set training.embedding_std above 0 and training.tied_router to False.",
        )
        require(self.steps > 0, "phases must hold at least one step.")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def steps(self) -> int:
        return sum(p.steps for p in self.phases)

    @property
    def recent(self) -> int:
        """Most batches that any phase keeps in memory."""
        return max(p.recent for p in self.phases)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """Build from nested plain mappings; unknown names raise `ConfigError`."""
        values = dict(values)
        try:
            phases = tuple(Phase(**dict(p)) for p in values.pop("phases"))
            optimizer = OptimizerConfig(**dict(values.pop("optimizer", {})))
            return cls(phases=phases, optimizer=optimizer, **values)
        except (TypeError, KeyError) as e:
            raise ConfigError(f"Training settings: {e}.") from e
