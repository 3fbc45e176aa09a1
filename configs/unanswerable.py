"""Needles, and questions that the memory cannot answer, from the first step: the model learns to say so.

    python train.py --config=configs/unanswerable.py --workdir=runs/unanswerable_400
    python eval.py --config=configs/unanswerable.py --workdir=runs/unanswerable_400 --memory_tokens=16384

The task of configs/small.py; 30 % of the questions do not see their document. 400 steps, 4 minutes on one core. Seed 0,
16K tokens of memory, 64 questions of each kind: it refuses 0.53 of those without an answer and 0.02 of the others, and
answers 0.98 of these (docs/results.md).
"""

from ml_collections import ConfigDict

from msa_jax.configs.small import get_config as small


def get_config() -> ConfigDict:
    config = small()
    config.data.unanswerable = 0.3
    config.training.phases[1]["steps"] = 360
    return config
