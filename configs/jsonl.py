"""Retrieval and answers over your own documents: a folder with documents.jsonl and, if you have them, questions.jsonl.

    python train.py --config=configs/jsonl.py --config.data.folder=DIR --workdir=runs/mine
    python eval.py --config=configs/jsonl.py --config.data.folder=DIR --workdir=runs/mine --memory_tokens=65536

Questions may have several supporting documents; the reply quotes them all, and question_len holds two or three of
them. Set --config.init_from to start from a published checkpoint; from nothing, expect what the docstring of
configs/python_docs.py says.
"""

from ml_collections import ConfigDict

from msa_jax.configs.python_docs import get_config as python_docs


def get_config() -> ConfigDict:
    config = python_docs()
    config.data.source = "jsonl"
    config.data.num_documents = 128
    config.data.num_questions = 24
    config.data.question_len = 416
    config.evaluation.max_rounds = 4
    return config
