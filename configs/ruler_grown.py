"""RULER's third stage: the same tasks while the bank grows, so that numbers are read among documents with close scores.

    python -m msa_jax.export --workdir runs/ruler --out runs/ruler/export
    python train.py --config=configs/ruler_grown.py --workdir=runs/ruler_grown
    python eval.py --task=ruler --workdir=runs/ruler_grown --set=modes=generate,constrained \\
        --config=ruler_grown --config.model.router_bias_scale=2

Goes on from configs/ruler.py. Documents of the seven batches before stay in memory (docs/training.md): 512 documents,
37K tokens. 10 minutes on one core. Mean over the eight tasks with twice the bias of the training and in mode
"constrained": 0.989 at 32K tokens of memory, 0.967 at 100M (docs/results.md).
"""

from ml_collections import ConfigDict

from msa_jax.configs.ruler import SINGLE
from msa_jax.configs.ruler import get_config as second_stage

# As in the second stage, and uuids, of which a large memory has the most that are alike, twice as often.
TASKS = tuple(
    name
    for single in (*SINGLE, "niah_single_3", "niah_multikey_3")
    for name in ("niah_multivalue", "niah_multiquery", single)
)


def get_config() -> ConfigDict:
    config = second_stage()
    config.init_from = config.tokenizer.path = "runs/ruler/export"
    config.data.ruler_tasks = TASKS
    (phase,) = config.training.phases
    config.training.phases = [dict(phase, steps=50, recent=1), dict(phase, steps=300, recent=7)]
    config.training.optimizer.update(learning_rate=0.008, adam_learning_rate=1e-3, warmup_steps=10)
    config.training.seed = 1
    return config
