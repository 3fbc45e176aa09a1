"""Needles in short documents, with questions that the memory cannot answer among those trained on.

    python train.py --config=configs/abstention.py --workdir=runs/abstention
    python train.py --config=configs/abstention.py --workdir=runs/always --config.data.unanswerable=0.0
    python -m benchmarks.quality.refusals --workdirs runs/always,runs/abstention
"""

from ml_collections import ConfigDict

from msa_jax.run_config import full_config


def get_config() -> ConfigDict:
    return full_config(
        {
            "model": {
                "preset": "tiny",
                "chunk_size": 16,
                "top_k": 16,
                "router_bias": True,
                "router_bias_init": 40.0,
            },
            "tokenizer": {"vocab_size": 2048, "template": "compact"},
            "data": {
                "source": "needles",
                "max_chars": 1_000_000,
                "document_len": 64,
                "num_documents": 48,
                "num_questions": 32,
                "question_len": 128,
                "num_words": 256,
                "unanswerable": 0.25,
            },
            "training": {
                "phases": [
                    {"steps": 60, "lm_weight": 0.1, "aux_weight": 1.0, "mean_over_tokens": True},
                    {"steps": 200, "lm_weight": 1.0, "aux_weight": 0.5},
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
