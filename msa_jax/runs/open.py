"""The model and tokenizer of a trained run, or of a checkpoint in the published layout."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
from flax import nnx

from msa_jax.checkpoints import pretrained
from msa_jax.checkpoints.run import Checkpoints
from msa_jax.config import MSAConfig
from msa_jax.data import Renderer, Tokenizer
from msa_jax.errors import ConfigError
from msa_jax.model import MSATransformer
from msa_jax.runs.build import model_skeleton, open_tokenizer
from msa_jax.runs.config import RunConfig
from msa_jax.runs.workdir import INIT_CONFIG, written_settings

# Tokens of the longest document that a published checkpoint's bank takes unless told otherwise.
_ROW_LEN = 4096


def open_run(workdir: str | pathlib.Path) -> RunConfig:
    """The settings of a trained run; raises ConfigError when there is none."""
    try:
        return RunConfig.from_dict(written_settings(pathlib.Path(workdir)))
    except OSError as e:
        raise ConfigError(f"{workdir}: no trained run there ({e.strerror}: config.json).") from e
    except ValueError as e:
        raise e if isinstance(e, ConfigError) else ConfigError(f"{workdir}/config.json: not valid JSON ({e}).") from e


def load_model(run: RunConfig, workdir: pathlib.Path, step: int | None = None) -> tuple[MSATransformer, Renderer]:
    """The trained model of a run (its moving average, if there is one) and the renderer of its documents.

    `step`: of the checkpoint, one of those that were kept; None for the latest.

    Raises:
      CheckpointError, DataError: what is there is missing or does not fit.
    """
    if run.init_from and (workdir / INIT_CONFIG).is_file():
        run = dataclasses.replace(run, init_from=str(workdir / INIT_CONFIG))
    tokenizer = open_tokenizer(run, workdir, train=False)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=run.training.keep_checkpoints)
    graphdef, state = nnx.split(model_skeleton(run, tokenizer))
    params = checkpoints.restore_params(nnx.as_pure(state), ema=run.training.optimizer.ema_decay > 0, step=step)
    checkpoints.close()
    return nnx.merge(graphdef, params), Renderer(tokenizer, run.data.document_len, run.data.loss_weights)


def reconfigured(model: MSATransformer, **changes) -> MSATransformer:
    """The same parameters under another configuration, such as another `top_k_documents` or `dtype`.

    Raises:
      ConfigError: an unknown name, a bad value, or one that changes the parameters.
    """
    config = MSAConfig.from_dict(model.config.to_dict() | changes)
    skeleton = nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0), shardings=model.shardings))
    graphdef, abstract = nnx.split(skeleton)
    params = nnx.as_pure(nnx.state(model))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), nnx.as_pure(tree))  # noqa: E731
    if shapes(abstract) != shapes(params):
        raise ConfigError(f"{changes} would change the parameters of a trained model; train one with them.")
    return nnx.merge(graphdef, params)


def open_model(
    *, workdir: str | pathlib.Path = "", checkpoint: str | pathlib.Path = ""
) -> tuple[MSATransformer, Tokenizer, int]:
    """The model, its tokenizer, and how many tokens its longest document may have.

    Args:
      workdir: of a trained run, or
      checkpoint: a folder in the published layout, its tokenizer within.

    Raises:
      ConfigError: both or neither are given, or there is no run.
      CheckpointError, DataError: what is there is damaged or does not fit.
    """
    if bool(workdir) == bool(checkpoint):
        raise ConfigError("give either the workdir of a trained run or the folder of a checkpoint.")
    if checkpoint:
        model, tokenizer = pretrained.load_model(checkpoint), Tokenizer.load(checkpoint, add_missing=True)
        chunk = model.config.chunk_size
        return model, tokenizer, -(-_ROW_LEN // chunk) * chunk
    folder = pathlib.Path(workdir)
    run = open_run(folder)
    model, renderer = load_model(run, folder)
    return model, renderer.tokenizer, run.row_len(model.config.chunk_size)
