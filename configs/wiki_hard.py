"""Retrieval of real questions, second stage: the wrong passages that the first stage's router ranks highest.

    python -m msa_jax.evaluation.mine --workdir runs/wiki --out runs/wiki/negatives.jsonl \\
        --export runs/wiki/export
    python train.py --config=configs/wiki_hard.py --config.data.folder=DIR,DIR,... --workdir=runs/wiki_hard
    python eval.py --task=questions --workdir=runs/wiki_hard

Goes on from configs/wiki.py with its model. Mining knows the real questions and as many pairs as there is time for, so
here real questions are 40 % of a batch, and each brings two passages that the router took for its own. Six minutes
for mining and four for the 200 steps on two cores. It changes little: recall@16 of HotpotQA's evidence goes from 0.86
to 0.88 among its own passages and from 0.82 to 0.81 among all (docs/results.md).
"""

from ml_collections import ConfigDict

from msa_jax.runs.config import full_config

FIRST = "runs/wiki"


def get_config() -> ConfigDict:
    return full_config(
        {
            "init_from": f"{FIRST}/export",
            "model": {"router_layers": (1,), "chunk_size": 16, "top_k_documents": 1},
            "tokenizer": {"path": f"{FIRST}/export", "template": "compact", "id_digits": 5},
            "data": {
                "source": "jsonl",
                "titles": True,
                "samples": "question",
                "pair_fraction": 0.6,
                "hidden_fraction": 0.5,
                "eval_fraction": 0.5,
                "hard_negatives": f"{FIRST}/negatives.jsonl",
                "document_len": 128,
                "num_documents": 128,
                "num_questions": 32,
                "num_negatives": 2,
                "question_len": 40,
            },
            "training": {
                "phases": [{"steps": 200, "lm_weight": 0.0, "aux_weight": 1.0, "recent": 7}],
                "optimizer": {
                    "name": "muon",
                    "learning_rate": 0.002,
                    "adam_learning_rate": 5e-4,
                    "warmup_steps": 20,
                },
                "temperature": 0.05,
                "max_targets": 1,
                "checkpoint_every": 50,
                "seed": 1,
            },
        }
    )
