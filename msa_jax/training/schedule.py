"""Which phase a step belongs to, and the learning rate it gets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from msa_jax.training.config import OptimizerConfig, Phase, TrainingConfig


@struct.dataclass
class PhaseValues:
    """A phase as traced scalars, so that changing phase does not recompile."""

    lm_weight: jax.Array
    aux_weight: jax.Array
    mean_over_tokens: jax.Array
    recent: jax.Array


def phase_at(phases: tuple[Phase, ...], step: int) -> Phase:
    """Phase of a step counted from 0; the last one goes on after the end."""
    for phase in phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return phases[-1]


def phase_values(phase: Phase) -> PhaseValues:
    return PhaseValues(
        lm_weight=np.float32(phase.lm_weight),
        aux_weight=np.float32(phase.aux_weight),
        mean_over_tokens=np.bool_(phase.mean_over_tokens),
        recent=np.int32(phase.recent),
    )


def lr_factor(training: TrainingConfig) -> optax.Schedule:
    """Learning rate of each step relative to the peak: warm-up, decay, and each phase's own scale."""
    c: OptimizerConfig = training.optimizer
    ends = np.cumsum([p.steps for p in training.phases])
    scales = jnp.asarray([p.lr_scale for p in training.phases], jnp.float32)

    def factor(step):
        warm = jnp.minimum(1.0, (step + 1) / max(1, c.warmup_steps))
        done = jnp.clip((step - c.warmup_steps) / max(1, training.steps - c.warmup_steps), 0.0, 1.0)
        left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done))}[c.decay]
        decay = 1.0 if c.decay == "constant" else c.final_fraction + (1.0 - c.final_fraction) * left
        phase = jnp.minimum(jnp.searchsorted(jnp.asarray(ends), step, side="right"), len(ends) - 1)
        return warm * decay * scales[phase]

    return factor
