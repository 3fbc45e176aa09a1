"""The first sentence of a docstring asks for the object it documents, over this Python's standard library.

    python train.py --config=configs/python_docs.py --workdir=runs/python_docs
    python eval.py --config=configs/python_docs.py --workdir=runs/python_docs --memory_tokens=65536

200 steps take 3.5 minutes on two cores. From 1,752 questions a model without any pretraining learns little that
carries over: on held-out questions router recall@16 was 0.59 among 822 documents (65,536 tokens) and 0.29 among
6,572 (524,288 tokens), with no exact answer. It shows the task and its data; it is no recipe for them yet.
"""

from ml_collections import ConfigDict

from msa_jax.configs.demo import get_config as demo


def get_config() -> ConfigDict:
    config = demo()
    config.data.source = "python_docs"
    config.data.max_chars = None
    config.data.question_len = 224
    config.training.phases[1]["steps"] = 140
    config.training.max_targets = None
    config.evaluation.max_new_tokens = 32
    return config
