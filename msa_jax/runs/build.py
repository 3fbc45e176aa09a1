"""What is made of a run's settings: tokenizer, sources, model; and the run itself. For train.py and eval.py."""

from __future__ import annotations

import logging
import math
import pathlib
from typing import TYPE_CHECKING

import jax
from flax import nnx

from msa_jax import distributed
from msa_jax.checkpoints import pretrained
from msa_jax.data import Renderer, Source, Tokenizer
from msa_jax.data.config import DataConfig
from msa_jax.data.splits import Split
from msa_jax.errors import ConfigError
from msa_jax.importing import require_extra
from msa_jax.model import MSATransformer
from msa_jax.routing import need_scores
from msa_jax.runs.config import RunConfig
from msa_jax.runs.workdir import check_workdir
from msa_jax.sharding import DATA, MEMORY, MODEL, Shardings, check_model
from msa_jax.training import bag_of_words
from msa_jax.training.init import copy_circuit, embedding_stream, tie_router

if TYPE_CHECKING:
    from msa_jax.training.loop import TrainingResult

_LOG = logging.getLogger(__name__)


def make_source(data: DataConfig, tokenizer: Tokenizer, split: Split) -> Source:
    """The source of a split, no document longer than `data.document_len`."""
    return data.settings.build(data, tokenizer, split)


def open_tokenizer(run: RunConfig, workdir: pathlib.Path, *, train: bool) -> Tokenizer:
    """The tokenizer saved with a run; with `train`, made and saved if there is none yet."""
    folder = workdir / "tokenizer"
    if (folder / "tokenizer.json").is_file() or not train:
        return Tokenizer.load(folder)
    template = run.tokenizer.make_template()
    if run.tokenizer.path:
        tokenizer = Tokenizer.load(run.tokenizer.path, template, add_missing=True)
    else:
        source = run.data.settings
        texts, pattern = source.texts(run.data), source.word_pattern
        tokenizer = Tokenizer.train(texts, run.tokenizer.vocab_size, template, word_pattern=pattern)
    tokenizer.save(folder)
    return tokenizer


def model_skeleton(
    run: RunConfig,
    tokenizer: Tokenizer,
    shardings: Shardings = Shardings(),  # noqa: B008
) -> MSATransformer:
    """The model of a run, shapes only.

    Raises:
      ConfigError: the model does not fit the tokenizer.
    """
    config = run.model_config(tokenizer.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model's embedding {config.vocab_size} rows; "
            "use the checkpoint's own tokenizer, with numbers spelt plain."
        )
    return nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0), shardings=shardings))


def make_mesh(run: RunConfig) -> jax.sharding.Mesh | None:
    """The mesh of training over all devices of all processes; None: there is one device.

    Raises:
      ConfigError: the mesh does not fit the devices, or does not divide the batch.
    """
    mesh = run.mesh.make()
    if mesh.size == 1:
        return None
    for name, axes in (("num_documents", (DATA, MEMORY)), ("num_questions", (DATA,))):
        size, ways = getattr(run.data, name), math.prod(mesh.shape[a] for a in axes)
        if size % ways:
            raise ConfigError(
                f"data.{name} {size} cannot be spread over {ways} devices (mesh axes {', '.join(axes)}); "
                f"{size // ways * ways + ways} can."
            )
    check_model(run.model_config(vocab_size=mesh.shape[MODEL]), mesh)
    return mesh


def make_model(
    run: RunConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh | None = None, *, source: Source | None = None
) -> MSATransformer:
    """The model at the start of training; on a mesh, every parameter is made where it stays.

    Args:
      source: that of training, if it is there already: a start as a bag of words counts words in its documents.

    Raises:
      ConfigError: the vocabulary does not fit the model, or the mesh does not divide the model.
    """
    training = run.training
    shardings = Shardings.training(run.mesh) if mesh else Shardings()
    skeleton = model_skeleton(run, tokenizer, shardings)
    config, places = skeleton.config, None
    if mesh:
        check_model(config, mesh)
        places = shardings.parameters(nnx.as_pure(nnx.state(skeleton)), mesh)
    if run.init_from:
        return pretrained.load_model(run.init_from, config, seed=training.seed, mesh=mesh, shardings=shardings)

    if training.bag_of_words:
        documents = (source or make_source(run.data, tokenizer, "train")).documents
        weights = bag_of_words.rarity(tokenizer, (document.text for document in documents), config.vocab_size)
        last = bag_of_words.last_routing_token(tokenizer)

    def create():
        rngs = nnx.Rngs(training.seed)
        model = MSATransformer(config, rngs=rngs, shardings=shardings)
        if training.embedding_std:
            embedding_stream(model, embedding_std=training.embedding_std, logit_scale=training.logit_scale)
        if training.tied_router:
            tie_router(model)
        if training.bag_of_words:
            std = training.embedding_std
            bag_of_words.bag_of_words(model, weights, last, embedding_std=std, rngs=rngs)
        if training.copy_scale:
            copy_circuit(model, training.copy_scale, rngs=rngs)
        return nnx.as_pure(nnx.state(model))

    return nnx.merge(nnx.graphdef(skeleton), jax.jit(create, out_shardings=places)())


def train_run(run: RunConfig, workdir: str | pathlib.Path) -> TrainingResult:
    """Train, or go on with, the run in `workdir`; see `msa_jax.training.loop.train`.

    Raises:
      ConfigError, DataError, CheckpointError: something is wrong with the settings, the data, or `workdir`.
      TrainingDiverged: the loss became NaN or infinite.
      ImportError: the extra "train" is not installed.
    """
    require_extra("train")
    # Here, because what a trained model is asked with needs neither.
    from msa_jax.data.pipeline import make_dataset
    from msa_jax.training.loop import train

    workdir = pathlib.Path(workdir)
    # Whatever is wrong with the model shows here, before any work.
    need_scores(run.model_config(vocab_size=8).retriever, "training")
    distributed.agree(run.to_dict() | {"workdir": str(workdir)})
    mesh = make_mesh(run)
    # Process 0 makes the folder and the tokenizer that the others then find.
    if distributed.is_main():
        check_workdir(run, workdir)
        open_tokenizer(run, workdir, train=True)
    distributed.wait_for_all("workdir")
    check_workdir(run, workdir)
    tokenizer = open_tokenizer(run, workdir, train=True)
    source = make_source(run.data, tokenizer, "train")
    model = make_model(run, tokenizer, mesh, source=source)
    if mesh:
        _LOG.info("mesh %s over %d processes", dict(mesh.shape), jax.process_count())
    dataset = make_dataset(
        source, tokenizer,
        num_documents=run.data.num_documents, num_questions=run.data.num_questions,
        chunk_size=model.config.chunk_size, row_len=run.row_len(model.config.chunk_size),
        document_len=run.data.document_len, question_len=run.data.question_len,
        loss_weights=run.data.loss_weights, samples=run.data.samples, unanswerable=run.data.unanswerable,
        label_fraction=run.data.label_fraction,
        seed=run.training.seed,
        parts=mesh.shape[DATA] * mesh.shape[MEMORY] if mesh else 1,
    )  # fmt: skip
    _LOG.info("%s questions to train on", f"{len(source):,}")
    return train(model, dataset, run.training, workdir, prefix=tuple(Renderer(tokenizer).prefix), mesh=mesh)
