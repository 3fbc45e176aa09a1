"""RULER's eight needle tasks (arXiv 2404.06654), learned in two stages on one CPU core.

    python train.py --config=configs/ruler_single.py --workdir=runs/ruler_single
    python -m msa_jax.export --workdir runs/ruler_single --out runs/ruler_single/export
    python train.py --config=configs/ruler.py --workdir=runs/ruler
    python eval.py --task=ruler --workdir=runs/ruler --memory_tokens=32768 --set=modes=generate,constrained

14 and 19 minutes on one core. Of the wanted values at 32K tokens of memory, mean over the eight tasks, 0.927 are in the
answers when all is generated freely and 0.982 in mode "constrained" (docs/results.md).

The first stage learns the six tasks that one document answers; this one goes on from there with all eight. Two of three
questions are of the two tasks that four documents answer, so few of a batch's long rows are padding.
"""

from ml_collections import ConfigDict

from msa_jax.runs.config import full_config

SINGLE = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
# Tasks are asked in turn: all of a batch's nine questions by their places here.
TASKS = tuple(name for single in SINGLE for name in ("niah_multivalue", "niah_multiquery", single))


def get_config() -> ConfigDict:
    return full_config(
        {
            "init_from": "runs/ruler_single/export",
            "model": {"chunk_size": 16, "top_k_documents": 16, "router_bias": True},
            "tokenizer": {"path": "runs/ruler_single/export", "template": "compact"},
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
                "phases": [{"steps": 700, "lm_weight": 1.0, "aux_weight": 0.5}],
                "optimizer": {
                    "name": "muon",
                    "learning_rate": 0.012,
                    "adam_learning_rate": 1.2e-3,
                    "warmup_steps": 20,
                },
                "max_targets": 120,
                "checkpoint_every": 50,
                "seed": 0,
            },
            "evaluation": {"num_questions": 64, "batch_size": 64, "max_rounds": 2, "max_new_tokens": 48},
        }
    )
