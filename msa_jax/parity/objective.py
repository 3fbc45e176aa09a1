"""The losses of a recorded training step, the published code's ways included.

Sizes: B samples, R documents of the batch, L_r router layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msa_jax.config import MSAConfig
from msa_jax.errors import DataError
from msa_jax.parity.recording import Recording
from msa_jax.training.losses import recall_at, router_loss

METHODS = {
    "INFONCE": "infonce",
    "INFONCE_DECOUPLE": "infonce_decoupled",
    "INFONCE_FOCAL": "infonce_focal",
    "INFONCE_DECOUPLE_FOCAL": "infonce_decoupled_focal",
}
GRADIENT_METHOD = "INFONCE_DECOUPLE"
# The published code logs these, each cut to the documents that a sample has.
RECALL_AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Objective:
    """How the recorded losses follow from scores and labels.

    Attributes:
      counted: [L_r] bool, router layers whose scores are trained: those of the latter half only.
      labelled: [B] bool, samples with labels for their documents.
      relevant, visible: [B, R] bool.
      temperature, lm_weight, aux_weight: from the recorded config.
    """

    counted: np.ndarray
    labelled: np.ndarray
    relevant: np.ndarray
    visible: np.ndarray
    temperature: float
    lm_weight: float
    aux_weight: float

    @classmethod
    def of(cls, recording: Recording, config: MSAConfig, visible: np.ndarray, labels: Any) -> Objective:
        """From `aux_labels` of scalars.json, a list of 0 and 1 for each sample's documents.

        Raises:
          DataError: the labels do not fit the documents.
        """
        samples = len(visible)
        relevant = np.zeros_like(visible)
        if not isinstance(labels, list) or len(labels) != samples:
            raise DataError(f"{recording.path / 'scalars.json'}: aux_labels must have {samples} lists.")
        for sample, row in enumerate(labels):
            # The published code lines labels up with the documents that a sample has.
            mine = np.flatnonzero(visible[sample])
            if row and len(row) != len(mine):
                raise DataError(
                    f"{recording.path / 'scalars.json'}: aux_labels has {len(row)} for sample {sample} "
                    f"with {len(mine)} documents."
                )
            relevant[sample, mine[np.asarray(row, bool)] if row else []] = True
        msa = recording.msa
        return cls(
            counted=np.array(config.router_layers) >= config.num_layers // 2,
            labelled=np.array([bool(row) for row in labels]),
            relevant=relevant,
            visible=visible,
            temperature=min(max(float(msa.get("infonce_loss_temp", 0.1)), 0.001), 0.5),
            lm_weight=float(msa.get("lmloss_weight", msa.get("lmloss_weigth", 1.0))),
            aux_weight=float(msa.get("auxloss_weight", 0.1)),
        )

    def aux_loss(self, scores: jax.Array, method: str) -> jax.Array:
        """The named loss on `scores` [L_r, B, R], averaged over counted layers and labelled samples."""
        gamma = 2.0
        if method == "INFONCE_DECOUPLE_FOCAL":
            # The published call passes the number of positives in gamma's place.
            gamma = jnp.asarray(self.relevant.sum(1)[None, :, None], jnp.float32)
        losses = router_loss(
            scores, jnp.asarray(self.relevant)[None], jnp.asarray(self.visible)[None],
            method=METHODS[method], temperature=self.temperature, gamma=gamma,
        )  # fmt: skip
        weights = self.counted[:, None] & self.labelled[None, :]
        return jnp.sum(losses * weights) / max(weights.sum(), 1)

    def recalls(self, scores: jax.Array) -> dict[int, jax.Array]:
        """Recall among the n best, [L_r, B], for every n that `recall` needs."""
        return {
            n: recall_at(scores, jnp.asarray(self.relevant), jnp.asarray(self.visible), n, most=10)
            for n in sorted({n for sample in self.visible for n in self._cut(sample)})
        }

    def recall(self, recalls: dict[int, jax.Array]) -> dict[str, float]:
        """recall@n as the published code averages it: over the samples that have n documents or more.

        A sample with fewer documents than n counts under the number that it has.
        """
        values: dict[str, list[np.ndarray]] = {}
        for sample in np.flatnonzero(self.labelled):
            for n in self._cut(self.visible[sample]):
                values.setdefault(f"recall@{n}", []).append(np.asarray(recalls[n])[self.counted, sample])
        return {name: float(np.mean(found)) for name, found in values.items()}

    @staticmethod
    def _cut(visible):
        return [min(n, int(visible.sum())) for n in RECALL_AT]
