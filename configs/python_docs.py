"""The first sentence of a docstring asks for the object it documents, over this Python's standard library.

    python train.py --config=configs/python_docs.py --workdir=runs/python_docs
    python eval.py --config=configs/python_docs.py --workdir=runs/python_docs --memory_tokens=65536

PYDOCS_NOTE
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
            "tokenizer": {"vocab_size": 4096, "template": "compact"},
            "data": {
                "source": "python_docs",
                "folder": "",
                "document_len": 128,
                "num_documents": 64,
                "num_questions": 32,
                "question_len": 320,
            },
            "training": {
                "phases": [
                    {"steps": 60, "lm_weight": 0.1, "aux_weight": 1.0, "mean_over_tokens": True},
                    {"steps": 340, "lm_weight": 1.0, "aux_weight": 0.5},
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
                "checkpoint_every": 100,
                "seed": 0,
            },
            "evaluation": {"num_questions": 128, "batch_size": 64, "max_rounds": 2, "max_new_tokens": 32},
        }
    )
