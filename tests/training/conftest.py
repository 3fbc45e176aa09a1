"""A run small enough for tests: needles in a haystack of made-up sentences, a model of two layers."""

import contextlib
import copy
import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from msa_jax.checkpoints.run import Checkpoints
from msa_jax.data.pipeline import make_dataset
from msa_jax.runs.build import make_model, make_source, open_tokenizer
from msa_jax.runs.workdir import check_workdir
from msa_jax.training.optimizer import make_optimizer
from msa_jax.training.step import init_state

WORDS = (
    "river stone cloud field paper light music garden window market winter summer bridge letter copper "
    "silver engine forest harbor island jacket kettle ladder mirror needle orange pencil rabbit saddle "
    "tunnel valley wagon"
).split()

SETTINGS = {
    "model": {
        "preset": "tiny",
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 32,
        "mlp_size": 96,
        "chunk_size": 16,
        "top_k_documents": 4,
        "router_bias": True,
    },
    "tokenizer": {"vocab_size": 640},
    "data": {
        "source": "needles",
        "document_len": 80,
        "num_documents": 16,
        "num_questions": 12,
        "question_len": 176,
        "num_words": 16,
    },
    "training": {
        "phases": [
            {"steps": 50, "lm_weight": 0.1, "aux_weight": 1.0, "mean_over_tokens": True},
            {"steps": 70, "lm_weight": 1.0, "aux_weight": 0.5},
        ],
        "optimizer": {
            "name": "muon",
            "learning_rate": 0.02,
            "adam_learning_rate": 3e-3,
            "warmup_steps": 5,
        },
        "embedding_std": 0.5,
        "logit_scale": 0.1,
        "tied_router": True,
        "copy_scale": 0.5,
        "max_targets": 44,
        "log_every": 1,
        "checkpoint_every": 10,
    },
    "evaluation": {"num_questions": 8, "batch_size": 8, "rows_per_step": 16},
}


@pytest.fixture(scope="session")
def haystack(tmp_path_factory):
    """A folder with a documents.jsonl of 60 texts of made-up sentences."""
    folder = tmp_path_factory.mktemp("haystack")
    rng = np.random.default_rng(0)
    with (folder / "documents.jsonl").open("w") as file:
        for i in range(60):
            text = " ".join(" ".join(rng.choice(WORDS, 9)) + "." for _ in range(30))
            file.write(json.dumps({"id": str(i), "title": f"text {i}", "text": text}) + "\n")
    return folder


@pytest.fixture
def settings(haystack):
    """Settings of a run of 120 steps, free to be changed."""
    values = copy.deepcopy(SETTINGS)
    values["data"]["folder"] = str(haystack)
    return values


def write_config(path, settings):
    """A file for `--config` that returns these settings."""
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({settings!r})\n"
    )


@pytest.fixture
def config_file(settings, tmp_path):
    """The settings as a file for `--config`."""
    path = tmp_path / "config.py"
    write_config(path, settings)
    return path


def dataset_of(run, tokenizer, **changes):
    given = dict(
        num_documents=run.data.num_documents, num_questions=run.data.num_questions, chunk_size=16,
        row_len=run.row_len(16), question_len=run.data.question_len, seed=3,
    )  # fmt: skip
    return make_dataset(make_source(run.data, tokenizer, "train"), tokenizer, **given | changes)


def save_start(run, workdir):
    """A workdir with a checkpoint of step 1 that holds what training starts from: a run without the time it takes."""
    check_workdir(run, workdir)
    tokenizer = open_tokenizer(run, workdir, train=True)
    params = nnx.as_pure(nnx.state(make_model(run, tokenizer)))
    state = init_state(params, make_optimizer(run.training), run.training)
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=3)) as checkpoints:
        checkpoints.save(1, dataclasses.replace(state, step=state.step + 1), iter(dataset_of(run, tokenizer)))
        checkpoints.wait()
