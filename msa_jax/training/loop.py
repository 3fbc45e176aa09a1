"""The training loop: a page to be read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import pathlib
import time

import grain
import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from msa_jax import distributed
from msa_jax.checkpoints.run import Checkpoints
from msa_jax.data.batch import ROUTING
from msa_jax.errors import ConfigError, TrainingDiverged
from msa_jax.model import MSATransformer
from msa_jax.training.config import TrainingConfig
from msa_jax.training.log import RunLog
from msa_jax.training.optimizer import make_optimizer
from msa_jax.training.schedule import phase_at, phase_values
from msa_jax.training.step import empty_recent, init_state, make_step, spread_batch

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """`step`: steps done. `finished`: False when a signal asked the run to stop early. `metrics`: last logged."""

    step: int
    finished: bool
    metrics: dict[str, float]


@contextlib.contextmanager
def _sole_writer(workdir: pathlib.Path):
    """Hold the workdir for this process; the lock goes with the process, however it ends."""
    with (workdir / f".lock-{jax.process_index()}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{workdir}: another training process is at work here; wait for it, or use another workdir."
            ) from None
        yield


def _to_host(pending: list[tuple[int, dict]]) -> dict[str, float]:
    """Latest of the pending metrics as floats, after making sure that none of them is NaN."""
    for step, metrics in (pending := jax.device_get(pending)):
        if not np.isfinite(metrics["loss"]):
            raise TrainingDiverged(
                f"The loss of step {step} is {metrics['loss']}; training stopped. The last checkpoint is from before "
                "it: resume from it with a lower learning rate, in a new workdir."
            )
    return {name: float(value) for name, value in pending[-1][1].items()}


def train(
    model: MSATransformer,
    dataset: grain.IterDataset,
    settings: TrainingConfig,
    workdir: str | pathlib.Path,
    *,
    prefix: tuple[int, ...],
    mesh: jax.sharding.Mesh | None = None,
) -> TrainingResult:
    """Train `model`, or go on where the run in `workdir` stopped.

    Running it again after any interruption continues from the last checkpoint: with the same devices the
    result equals that of an uninterrupted run, bit for bit on CPU. Other devices, another mesh and another number of
    processes go on too, to the same result up to rounding.

    Args:
      model: at the start of training; its arrays are given away.
      dataset: of `Batch`es of one shape, the same in every process.
      settings: what to do.
      workdir: an existing folder; checkpoints and logs go there.
      prefix: token ids of the template prefix.
      mesh: devices over which the model's parameters are spread already; None: one device.

    Raises:
      ConfigError: another process trains in `workdir`, or a batch has more than `max_targets` or `max_routing` allows.
      CheckpointError: the checkpoint in `workdir` is another model's.
      TrainingDiverged: the loss became NaN or infinite.
    """
    workdir = pathlib.Path(workdir)
    keep = settings.keep_checkpoints
    with (
        _sole_writer(workdir),
        contextlib.closing(Checkpoints(workdir / "checkpoints", keep=keep)) as checkpoints,
        jax.set_mesh(mesh) if mesh else contextlib.nullcontext(),
    ):
        return _train(model, dataset, settings, workdir, prefix, checkpoints, mesh)


def _train(model, dataset, settings, workdir, prefix, checkpoints, mesh) -> TrainingResult:
    batches = iter(dataset)
    shardings = model.shardings

    # Model and optimiser.
    graphdef, state = nnx.split(model)
    optimizer = make_optimizer(settings)
    recent = empty_recent(graphdef, state, next(iter(dataset)), settings.recent) if settings.recent else None
    state = init_state(nnx.as_pure(state), optimizer, settings, mesh, shardings, recent)
    del model
    _LOG.info("%s parameters", f"{_size(state.params):,}")

    # Resume: no checkpoint, start; a checkpoint, go on behind it; a finished run, nothing to do.
    first = 0
    if checkpoints.latest_step is not None:
        state = checkpoints.restore(state, batches)
        first = int(state.step)
        _LOG.info("resumed after step %d", first)
    train_step = make_step(graphdef, optimizer, settings, prefix, state if mesh else None)

    main = distributed.is_main()
    stopped: str | None = None
    metrics: dict[str, float] = {}
    pending: list[tuple[int, dict]] = []
    step = first
    with (
        contextlib.closing(RunLog(workdir, resumed_step=first)) if main else contextlib.nullcontext() as log,
        distributed.StopSignal() as stop,
        tqdm(
            total=settings.steps, initial=first, desc="train", unit="step", mininterval=1.0, disable=not main
        ) as bar,
    ):
        clock, clock_step = time.monotonic(), first
        while step < settings.steps and not (stopped := stop.received(step)):
            batch = next(batches)
            check_limits(batch, settings)
            placed = spread_batch(batch, mesh, shardings) if mesh else batch
            state, latest = train_step(state, placed, phase_values(phase_at(settings.phases, step)))
            step += 1
            pending.append((step, latest))
            last = step == settings.steps
            saving = step % settings.checkpoint_every == 0 or last
            if step % settings.log_every == 0 or saving:
                metrics = _to_host(pending)
                pending = []
                seconds = (time.monotonic() - clock) / (step - clock_step)
                clock, clock_step = time.monotonic(), step
                metrics["tokens_per_second"] = _tokens(batch) / seconds
                if log:
                    log.write(step, metrics)
                bar.set_postfix_str(
                    f"loss {metrics['loss']:.3f} lm {metrics['lm_loss']:.3f} recall@1 {metrics['recall@1']:.2f} "
                    f"{metrics['tokens_per_second'] / 1e3:.1f}K tok/s",
                    refresh=False,
                )
            bar.update()
            if saving:
                checkpoints.save(step, state, batches)
        if pending:
            metrics = _to_host(pending)
        if step > first:
            checkpoints.save(step, state, batches)
        checkpoints.wait()
    if stopped:
        _LOG.info("%s: saved step %d; the same command goes on from here", stopped, step)
    return TrainingResult(step=step, finished=step >= settings.steps, metrics=metrics)


def _size(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _tokens(batch) -> int:
    """Tokens that exist, of documents and questions."""
    return int((batch.documents.segment_ids > 0).sum() + batch.questions.mask.sum())


def check_limits(batch, settings: TrainingConfig) -> None:
    asked = batch.questions
    routing = (asked.roles == ROUTING) & asked.mask
    for name, what, tokens in (
        ("max_targets", "tokens with loss", asked.loss_weights > 0),
        ("max_routing", "tokens that route", routing),
    ):
        limit, most = getattr(settings, name), int(tokens.sum(axis=1).max())
        if limit is not None and most > limit:
            raise ConfigError(f"A sample has {most} {what} and training.{name} is {limit}; raise it.")
