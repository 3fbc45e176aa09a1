"""bAbI's tasks 1 and 2 by Memory Interleave, learned from nothing on one CPU core.

    python train.py --config=configs/babi.py --workdir=runs/babi --config.data.folder=FOLDER
    python eval.py --task=babi --workdir=runs/babi

1,200 steps, 25 minutes on one core (1.0 s a step, more while other work ran). All 1,000 test questions of each task,
asked freely, seeds 0, 1, 2: task 1 1.000 each, task 2 0.980, 0.980, 0.979 with interleave and 0.239 to 0.256 with one
routing.
"""

from ml_collections import ConfigDict

from msa_jax.runs.config import full_config


def get_config() -> ConfigDict:
    return full_config(
        {
            "model": {
                "preset": "tiny",
                "chunk_size": 20,
                "top_k_documents": 16,
                "router_bias": True,
                "router_bias_init": 20.0,
            },
            "tokenizer": {"vocab_size": 512, "template": "compact", "id_digits": 2},
            "data": {
                "source": "babi",
                "babi_tasks": (1, 2),
                "samples": "steps",
                "document_len": 20,
                "num_documents": 160,
                "num_questions": 96,
                "question_len": 68,
                "eval_fraction": 0.05,
            },
            "training": {
                "phases": [
                    {"steps": 60, "lm_weight": 0.1, "aux_weight": 1.0, "mean_over_tokens": True},
                    {"steps": 1140, "lm_weight": 1.0, "aux_weight": 0.5},
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
                "max_targets": 8,
                "log_every": 20,
                "checkpoint_every": 100,
                "seed": 0,
            },
            "evaluation": {"max_rounds": 3},
        }
    )
