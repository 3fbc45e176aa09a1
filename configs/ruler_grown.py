"""RULER's third stage: the same tasks while the bank grows, so that numbers are read among documents with close scores.

    python -m benchmarks.quality.export --workdir runs/ruler --out runs/ruler/export
    python train.py --config=configs/ruler_grown.py --workdir=runs/ruler_grown
    python -m benchmarks.quality.ruler --workdir runs/ruler_grown --modes generate,constrained

Goes on from configs/ruler.py. Documents of the seven batches before stay in memory (docs/training.md): 512 documents,
37K tokens.
"""

from ml_collections import ConfigDict

from msa_jax.run_config import full_config

_SINGLE = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
# As in the second stage, and uuids, of which a large memory has the most that are alike, twice as often.
TASKS = tuple(
    name
    for single in (*_SINGLE, "niah_single_3", "niah_multikey_3")
    for name in ("niah_multivalue", "niah_multiquery", single)
)


def get_config() -> ConfigDict:
    return full_config(
        {
            "init_from": "runs/ruler/export",
            "model": {"chunk_size": 16, "top_k": 16, "router_bias": True},
            "tokenizer": {"path": "runs/ruler/export", "template": "compact"},
            "data": {
                "source": "ruler",
                "ruler_tasks": TASKS,
                "document_len": 76,
                "num_documents": 64,
                "num_questions": 9,
                "question_len": 480,
                "eval_fraction": 0.5,
                "samples": "at_once",
                "loss_weights": {"leading_id": 0.0},
            },
            "training": {
                "phases": [
                    {"steps": 50, "lm_weight": 1.0, "aux_weight": 0.5, "recent": 1},
                    {"steps": 300, "lm_weight": 1.0, "aux_weight": 0.5, "recent": 7},
                ],
                "optimizer": {
                    "name": "muon",
                    "learning_rate": 0.008,
                    "adam_learning_rate": 1e-3,
                    "warmup_steps": 10,
                },
                "max_targets": 120,
                "checkpoint_every": 50,
                "seed": 1,
            },
            "evaluation": {"num_questions": 64, "batch_size": 64, "max_rounds": 2, "max_new_tokens": 48},
        }
    )
