"""Recompute a recorded training step: forward, losses and every gradient.

Sizes: B samples, S tokens a sample as recorded, R documents of the batch (one row each), L_r router layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.checkpoints.published import published_tensors, to_published
from msa_jax.context import Context, Route
from msa_jax.errors import DataError
from msa_jax.memory import DocumentLayout
from msa_jax.model import MSATransformer
from msa_jax.parity.objective import GRADIENT_METHOD, METHODS, Objective
from msa_jax.parity.recording import TEMPLATE, Recording, compiled, document_chunks, pack, take
from msa_jax.parity.report import GRADIENT_TOLERANCE, Report
from msa_jax.training.losses import lm_loss

LOSSES = ("loss", "lm_loss", "aux_loss")
# Scores below are those of documents that a sample lacks.
ABSENT = -1e9


@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples of a recording, as places in their flat [B * S] tokens.

    Attributes:
      prefix: [B, Tp], template tokens before the documents; Tp may be 0.
      documents: [R, W].
      active: [B, T], what follows the documents.
      owner: [R], sample of each document.
      number: [R], its number in the sample, from 1.
    """

    prefix: np.ndarray
    documents: np.ndarray
    active: np.ndarray
    owner: np.ndarray
    number: np.ndarray

    @property
    def visible(self) -> np.ndarray:
        """[B, R] bool, a sample sees its own documents."""
        return self.owner[None, :] == np.arange(len(self.active))[:, None]


def split_samples(roles: np.ndarray, exists: np.ndarray, chunk_size: int, where: str) -> Batch:
    """Find prefix, documents and active context of each sample in `roles` and `exists` [B, S].

    `where` is where they come from, for messages.

    Raises:
      DataError: a sample is not template, documents, active context, in this order.
    """
    prefix, documents, active, owner, number = [], [], [], [], []
    for sample, (role, mask) in enumerate(zip(roles, exists, strict=True)):
        places = np.flatnonzero(mask)
        kinds = role[places]
        is_prefix = np.cumprod(kinds == TEMPLATE).astype(bool)
        is_document = kinds > 0
        in_memory = np.flatnonzero(is_document)
        if not len(in_memory) or np.any(~is_prefix[: in_memory[-1]] & ~is_document[: in_memory[-1]]):
            raise DataError(
                f"{where}: doc_ids of sample {sample} must be a template prefix, documents, then the rest."
            )
        prefix.append(sample * roles.shape[1] + places[is_prefix])
        active.append(sample * roles.shape[1] + places[~is_prefix & ~is_document])
        for n in np.unique(kinds[is_document]):
            documents.append(sample * roles.shape[1] + places[kinds == n])
            owner.append(sample)
            number.append(n)
    if not sum(map(len, active)):
        raise DataError(f"{where}: no token follows the documents, so there is nothing to compute.")
    return Batch(
        prefix=pack(prefix),
        documents=pack(documents, multiple=chunk_size),
        active=pack(active),
        owner=np.array(owner),
        number=np.array(number),
    )


def forward(model: MSATransformer, recording: Recording, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Hidden states [L + 1, B, S, E] in the recorded layout, 0 at padding, and scores [L_r, B, R]."""
    ids, roles, positions = (recording.array(name) for name in ("input_ids", "doc_ids", "position_ids"))
    gather = lambda name, rows: jnp.asarray(take(name.reshape(-1), rows))  # noqa: E731
    rows = batch.documents
    encoded = model.encode_documents(
        gather(ids, rows), segment_ids=jnp.asarray(rows >= 0, jnp.int32), positions=gather(positions, rows),
        return_hidden=True,
    )  # fmt: skip
    chunk_size = model.config.chunk_size
    index, owners = document_chunks((rows >= 0).sum(1), rows.shape[1] // chunk_size, chunk_size)
    layout = DocumentLayout.from_chunk_documents(owners, len(rows))
    states = jax.tree.map(lambda x: x[:, index], encoded.states)

    template, parts = None, [(rows, encoded.hidden)]

    def prefill(places, **kwargs):
        lengths = jnp.asarray(np.sum(places >= 0, axis=1))
        output = model.prefill(
            gather(ids, places), positions=gather(positions, places), lengths=lengths, return_hidden=True, **kwargs
        )
        parts.append((places, output.all_hidden))
        return output, lengths

    if batch.prefix.shape[1]:
        prefix, lengths = prefill(batch.prefix)
        template = Context(prefix.own, lengths, jnp.full_like(lengths, model.config.position_offset))
    bank, visible = model.bank(states, layout), jnp.asarray(batch.visible)
    read = Route(bank, gather(roles, batch.active) == 0, visible, bank_gradients=True, want=("scores",))
    output, _ = prefill(batch.active, template=template, read=read)
    # One place more than there are tokens takes the padding.
    full = jnp.zeros((encoded.hidden.shape[0], ids.size + 1, encoded.hidden.shape[-1]), jnp.float32)
    for places, hidden in parts:
        full = full.at[:, np.where(places >= 0, places, ids.size)].set(hidden)
    return full[:, :-1].reshape(full.shape[0], *ids.shape, -1), output.document_scores


def check_training(recording: Recording) -> Report:
    """Compare hidden states, logits, scores, all losses, recall and all gradients of a recorded step.

    Raises:
      ValueError: the folder holds no usable recording.
    """
    model = recording.model(routing_score="cosine")
    config = model.config
    ids = recording.array("input_ids", None, None)
    roles, exists, labels = (recording.array(n, *ids.shape) for n in ("doc_ids", "attention_mask", "labels"))
    recording.array("position_ids", *ids.shape)
    exists = exists == 1
    if ids.min() < 0 or ids.max() >= config.vocab_size or labels.max() >= config.vocab_size:
        raise DataError(f"{recording.path / 'io.npz'}: token ids must be below {config.vocab_size}.")
    scalars = _scalars(recording)
    batch = split_samples(roles, exists, config.chunk_size, str(recording.path / "io.npz"))
    objective = Objective.of(recording, config, batch.visible, scalars.get("aux_labels"))
    gradients = recording.gradients()

    graphdef, params = nnx.split(model)

    def loss_of(params):
        model = nnx.merge(graphdef, params)
        hidden, scores = forward(model, recording, batch)
        total, weight = lm_loss(
            hidden[-1, :, :-1], model.output_embedding, labels[:, 1:], jnp.asarray(labels[:, 1:] != -100)
        )
        lm = total / jnp.maximum(weight, 1.0)
        aux = {method: objective.aux_loss(scores, method) for method in METHODS}
        loss = objective.lm_weight * lm + objective.aux_weight * aux[GRADIENT_METHOD]
        return loss, (hidden, model.logits(hidden[-1]), scores, lm, aux, objective.recalls(scores))

    def step(params):
        gradient, values = jax.grad(loss_of, has_aux=True)(params)
        return to_published(gradient, config), *values

    ours, hidden, logits, scores, lm, aux, recalls = jax.device_get(compiled(step)(params))
    report = Report(f"{recording.path}: training")
    for i in range(config.num_layers + 1):
        report.activation(f"hidden_{i}", hidden[i], recording.array(f"hidden_{i}"), valid=exists)
    report.activation("logits", logits, recording.array("logits"), valid=exists)
    _check_scores(report, recording, config.router_layers, batch, scores)
    _check_losses(report, scalars, objective, lm, aux, objective.recall(recalls))
    _check_gradients(report, ours, gradients, config)
    return report


def _scalars(recording: Recording) -> dict[str, Any]:
    scalars = recording.scalars()
    values = scalars.get("scalars")
    for method in METHODS:
        entry = values.get(method) if isinstance(values, dict) else None
        recall = entry.get("recall") if isinstance(entry, dict) else None
        numbers = (
            [entry.get(n) for n in LOSSES] + list(recall.values()) if isinstance(recall, dict) else [None]
        )
        if not all(isinstance(n, int | float) for n in numbers):
            raise DataError(
                f"{recording.path / 'scalars.json'}: scalars must give the numbers loss, lm_loss, aux_loss "
                f"and recall for {method}."
            )
    return scalars


def _check_scores(report, recording, layers, batch, scores):
    samples, columns = len(recording.array("input_ids")), 1 + batch.number.max()
    for i, layer in enumerate(layers):
        table = np.full((samples, columns), -np.inf)
        table[batch.owner, batch.number] = scores[i, batch.owner, np.arange(len(batch.owner))]
        recorded = recording.array(f"doc_scores_{layer}")
        name, present = f"doc_scores_{layer}", table > ABSENT
        if recorded.shape == table.shape and np.any((recorded > ABSENT) != present):
            report.fail(name, "other documents have scores than doc_ids names")
        else:
            report.activation(name, table, recorded, valid=present)


def _check_losses(report, scalars, objective, lm, aux, recall):
    for method in METHODS:
        ours = (objective.lm_weight * lm + objective.aux_weight * aux[method], lm, aux[method])
        values = scalars["scalars"][method]
        for name, value in zip(LOSSES, ours, strict=True):
            report.activation(f"{method} {name}", value, values[name])
        for name, value in values["recall"].items():
            if name in recall:
                report.activation(f"{method} {name}", recall[name], value)
            else:
                report.fail(f"{method} {name}", f"not computed; the samples give {', '.join(recall)}")


def _check_gradients(report, ours, recorded, config):
    largest = max((float(np.abs(g).max()) for g in recorded.values()), default=0.0)
    for name in [t.name for t in published_tensors(config)] + sorted(set(recorded) - set(ours)):
        if name in ours and name in recorded:
            # float32 sums of gradients this much larger leave errors of this size.
            report.relative(
                f"grad {name}", ours[name], recorded[name], tolerance=GRADIENT_TOLERANCE, floor=1e-6 * largest
            )
        elif name in ours and not np.any(ours[name]):
            report.note(f"grad {name}", "zero, and not recorded")
        else:
            report.fail(f"grad {name}", "not recorded" if name in ours else "recorded, but no parameter here")
