"""The first stage of RULER: the six tasks that one document answers, learned from nothing on one CPU core.

    python train.py --config=configs/ruler_single.py --workdir=runs/ruler_single

configs/ruler.py goes on from here. 500 steps, 14 minutes: the losses end at 0.002 (replies) and 0.03 (all), and the
router ranks the right document first in every question of the batch.
"""

from ml_collections import ConfigDict

from msa_jax.runs.config import full_config

TASKS = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")


def get_config() -> ConfigDict:
    return full_config(
        {
            "model": {
                "preset": "tiny",
                "chunk_size": 16,
                "top_k_documents": 16,
                "router_bias": True,
                "router_bias_init": 20.0,
            },
            "tokenizer": {"vocab_size": 12288, "template": "compact"},
            "data": {
                "source": "ruler",
                "ruler_tasks": TASKS,
                "uuid_pairs": True,
                "document_len": 76,
                "num_documents": 64,
                "num_questions": 24,
                "question_len": 192,
                "eval_fraction": 0.5,
                "samples": "at_once",
                "loss_weights": {"leading_id": 0.0},
            },
            "training": {
                "phases": [
                    {"steps": 60, "lm_weight": 0.1, "aux_weight": 1.0, "mean_over_tokens": True},
                    {"steps": 440, "lm_weight": 1.0, "aux_weight": 0.5},
                ],
                "optimizer": {
                    "name": "muon",
                    "learning_rate": 0.02,
                    "adam_learning_rate": 2e-3,
                    "warmup_steps": 30,
                },
                "embedding_std": 0.5,
                "logit_scale": 0.1,
                "tied_router": True,
                "copy_scale": 0.5,
                "max_targets": 44,
                "checkpoint_every": 50,
                "seed": 0,
            },
            "evaluation": {"num_questions": 64, "batch_size": 64, "max_rounds": 2, "max_new_tokens": 48},
        }
    )
