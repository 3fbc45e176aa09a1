"""Retrieval and answers over your own documents: a folder with documents.jsonl and, if you have them, questions.jsonl.

    python train.py --config=configs/jsonl.py --config.data.folder=DIR --workdir=runs/mine
    python eval.py --config=configs/jsonl.py --config.data.folder=DIR --workdir=runs/mine --memory_tokens=65536

JSONL_NOTE
"""

from ml_collections import ConfigDict

from configs.python_docs import get_config as python_docs


def get_config() -> ConfigDict:
    config = python_docs()
    config.data.source = "jsonl"
    return config
