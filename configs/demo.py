"""Needles in the documentation of the Python standard library, learned from nothing on two CPU cores.

    python train.py --config=configs/demo.py --workdir=runs/demo
    python eval.py --config=configs/demo.py --workdir=runs/demo --memory_tokens=16384,65536,262144,1048576
"""

from ml_collections import ConfigDict

from msa_jax.runs.config import full_config


def get_config() -> ConfigDict:
    return full_config(
        {
            "model": {
                "preset": "tiny",
                "chunk_size": 16,
                "top_k_documents": 16,
                "router_bias": True,
                "router_bias_init": 40.0,
            },
            "tokenizer": {"vocab_size": 4096, "template": "compact"},
            "data": {
                "source": "needles",
                "max_chars": 3_000_000,
                "document_len": 128,
                "num_documents": 64,
                "num_questions": 48,
                "question_len": 192,
                "num_words": 256,
            },
            "training": {
                "phases": [
                    {"steps": 60, "lm_weight": 0.1, "aux_weight": 1.0, "mean_over_tokens": True},
                    {"steps": 240, "lm_weight": 1.0, "aux_weight": 0.5},
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
                "max_targets": 40,
                "checkpoint_every": 100,
                "seed": 0,
            },
            "evaluation": {"num_questions": 128, "batch_size": 64, "max_rounds": 2},
        }
    )
