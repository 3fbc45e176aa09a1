"""The optimiser: optax AdamW or Muon, clipping and accumulation."""

from __future__ import annotations

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from msa_jax.training.config import TrainingConfig
from msa_jax.training.schedule import lr_factor


def _is_matrix(path, leaf) -> bool:
    """Linear kernels, stacked or not; embeddings, norms and biases are not."""
    return jax.tree_util.keystr(path, simple=True, separator=".").endswith("kernel") and leaf.ndim >= 2


def _muon_dimensions(params):
    """Per leaf: which axes Muon orthogonalises, or None for what goes to Adam; `lm_head` is an embedding."""

    def dims(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not _is_matrix(path, leaf) or name.startswith("lm_head"):
            return None
        return MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dims, params)


def make_optimizer(training: TrainingConfig) -> optax.GradientTransformation:
    """Optimiser over a plain tree of parameters; layers stacked on a leading axis are separate matrices."""
    c = training.optimizer
    factor = lr_factor(training)
    if c.name == "adamw":
        rule = optax.adamw(
            lambda step: c.learning_rate * factor(step), b1=c.b1, b2=c.b2, weight_decay=c.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_is_matrix, params),
        )  # fmt: skip
    else:
        rule = muon(
            lambda step: c.learning_rate * factor(step),
            adam_learning_rate=lambda step: c.adam_learning_rate * factor(step),
            adam_b1=c.b1, adam_b2=c.b2, weight_decay=c.weight_decay,
            muon_weight_dimension_numbers=_muon_dimensions,
        )  # fmt: skip
    rule = optax.chain(optax.clip_by_global_norm(c.clip_norm), rule)
    if c.accumulate == 1:
        return rule
    return optax.MultiSteps(rule, every_k_schedule=c.accumulate).gradient_transformation()
