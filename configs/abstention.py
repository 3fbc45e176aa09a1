"""The demo's model, taught in few further steps to say that the memory does not hold the answer.

    python train.py --config=configs/demo.py --workdir=runs/demo
    python -m msa_jax.export --workdir runs/demo --out runs/demo_saved
    python train.py --config=configs/abstention.py --workdir=runs/abstention
    python eval.py --config=configs/abstention.py --workdir=runs/abstention --memory_tokens=16384

Three minutes on one core. It refuses none of 64 unanswerable questions and answers 0.98 of the others: docs/results.md.
"""

from ml_collections import ConfigDict

from msa_jax.runs.config import full_config

SAVED = "runs/demo_saved"


def get_config() -> ConfigDict:
    return full_config(
        {
            "init_from": SAVED,
            "tokenizer": {"path": SAVED, "template": "compact"},
            "data": {
                "source": "needles",
                "max_chars": 3_000_000,
                "document_len": 128,
                "num_documents": 48,
                "num_questions": 32,
                "question_len": 192,
                "num_words": 256,
                "unanswerable": 0.3,
            },
            "training": {
                "phases": [{"steps": 60, "lm_weight": 1.0, "aux_weight": 0.5}],
                "optimizer": {
                    "name": "muon",
                    "learning_rate": 0.005,
                    "adam_learning_rate": 1e-3,
                    "warmup_steps": 5,
                },
                "max_targets": 40,
                "checkpoint_every": 20,
                "seed": 1,
            },
            "evaluation": {"num_questions": 128, "batch_size": 64, "max_rounds": 2},
        }
    )
