"""The training step: one encoding of the documents serves all questions about them.

Sizes: B questions, T active tokens, U targets a question, N documents, L_r router layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from msa_jax.context import Route
from msa_jax.data.batch import ROUTING, Batch, DocumentBatch, QuestionBatch
from msa_jax.errors import require
from msa_jax.memory import DocumentLayout, MemoryBank
from msa_jax.model import ModelOutput, MSATransformer
from msa_jax.sharding import Shardings, put
from msa_jax.training.config import TrainingConfig
from msa_jax.training.losses import lm_loss, router_loss, router_metrics
from msa_jax.training.recent import RecentDocuments, no_recent, remember, with_recent
from msa_jax.training.schedule import PhaseValues


@struct.dataclass
class TrainState:
    """All that a run needs to go on, besides its position in the data."""

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    ema: nnx.State | None
    recent: RecentDocuments | None = None


def spread_batch(batch: Batch, mesh: jax.sharding.Mesh, shardings: Shardings) -> Batch:
    """A batch on the host, the same in every process, onto a mesh."""
    place = lambda tree, spec: put(tree, jax.NamedSharding(mesh, spec))  # noqa: E731
    asked = batch.questions
    pairs = {name: place(getattr(asked, name), shardings.pairs) for name in ("visible", "relevant")}
    rest = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked) if f.name not in pairs}
    return Batch(
        documents=place(batch.documents, shardings.documents),
        questions=QuestionBatch(**place(rest, shardings.questions), **pairs),
    )


def layout_of(documents, max_length: int, axes: tuple[str, ...] | None = None) -> DocumentLayout:
    """The document layout of a packed batch, spread over `axes` of the mesh."""
    return DocumentLayout(
        chunk_documents=documents.chunk_documents,
        starts=documents.starts,
        lengths=documents.lengths,
        max_length=max_length,
        axes=axes,
    )


def encode(model: MSATransformer, docs: DocumentBatch) -> MemoryBank:
    """The bank of a batch's documents."""
    encoded = model.encode_documents(docs.tokens, segment_ids=docs.segment_ids, positions=docs.positions)
    layout = layout_of(docs, docs.tokens.shape[1] // model.config.chunk_size, model.shardings.bank)
    return model.bank(encoded.states, layout)


def forward(
    model: MSATransformer, batch: Batch, prefix: tuple[int, ...], *, mean_over_tokens: bool | jax.Array | None = None
) -> ModelOutput:
    """Encode the batch's documents and the template prefix, and run its questions over them."""
    return ask(model, encode(model, batch.documents), batch.questions, prefix, mean_over_tokens=mean_over_tokens)


def ask(
    model: MSATransformer,
    bank: MemoryBank,
    asked: QuestionBatch,
    prefix: tuple[int, ...],
    *,
    mean_over_tokens: bool | jax.Array | None = None,
    max_routing: int | None = None,
) -> ModelOutput:
    """Run questions behind the template prefix over a bank that is differentiated."""
    read = Route(
        bank, asked.roles == ROUTING, asked.visible,
        mean_over_tokens=mean_over_tokens, max_routing=max_routing, bank_gradients=True, want=("scores",),
    )  # fmt: skip
    template = model.encode_template(jnp.asarray([prefix], jnp.int32))
    return model.prefill(asked.tokens, lengths=jnp.sum(asked.mask, axis=1), template=template, read=read)


def loss_and_metrics(
    model: MSATransformer,
    batch: Batch,
    phase: PhaseValues,
    prefix: tuple[int, ...],
    training: TrainingConfig,
    recent: RecentDocuments | None = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], RecentDocuments | None]]:
    """`lm_weight * L_LM + aux_weight * L_aux` (paper eq. 5), the figures to log, and `recent` after this batch."""
    bank = own = encode(model, batch.documents)
    if recent is not None:
        bank, asked = with_recent(own, batch, recent, phase.recent)
        recent = remember(recent, own, batch)
        batch = dataclasses.replace(batch, questions=asked)
    output = ask(
        model, bank, batch.questions, prefix,
        mean_over_tokens=phase.mean_over_tokens, max_routing=training.max_routing,
    )  # fmt: skip
    loss, metrics = loss_of(model, batch, output, phase, training)
    return loss, (metrics, recent)


def loss_of(
    model: MSATransformer, batch: Batch, output: ModelOutput, phase: PhaseValues, training: TrainingConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `loss_and_metrics`, of what `forward` gave."""
    asked = batch.questions
    # Only positions that predict something pass the vocabulary projection. Nothing predicts token 0.
    is_target = (asked.loss_weights > 0).at[:, 0].set(False)
    _, where = jax.lax.top_k(is_target.astype(jnp.float32), training.max_targets or is_target.shape[1])
    take = jax.vmap(lambda row, index: row[index])  # whole rows, so that the backward pass scatters whole rows
    weights = take(jnp.where(is_target, asked.loss_weights, 0.0), where)
    hidden = take(output.hidden, jnp.maximum(where - 1, 0))
    lm_sum, lm_weight = lm_loss(hidden, model.output_embedding, take(asked.tokens, where), weights)
    lm = lm_sum / jnp.maximum(lm_weight, 1e-6)
    per_sample = jax.vmap(
        lambda scores: router_loss(
            scores, asked.relevant, asked.visible,
            method=training.aux_loss, temperature=training.temperature, gamma=training.gamma,
        )
    )(output.document_scores)  # fmt: skip
    counted = jnp.any(asked.relevant & asked.visible, axis=1)
    aux = jnp.sum(per_sample * counted[None]) / jnp.maximum(jnp.sum(counted) * per_sample.shape[0], 1)
    loss = phase.lm_weight * lm + phase.aux_weight * aux
    metrics = router_metrics(
        output.document_scores, asked.relevant, asked.visible,
        selected=output.selection.documents, lengths=output.selection.lengths,
    )  # fmt: skip
    return loss, metrics | {"loss": loss, "lm_loss": lm, "aux_loss": aux}


def init_state(
    params: nnx.State,
    optimizer: optax.GradientTransformation,
    training: TrainingConfig,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Shardings = Shardings(),  # noqa: B008
    recent: RecentDocuments | None = None,
) -> TrainState:
    """The state before the first step; on a mesh each array is made where it stays, and `params` are given away.

    Raises:
      ConfigError: `recent` documents on a mesh.
    """
    require(
        mesh is None or recent is None,
        "training.phases: recent documents stay in memory on one device only; on a mesh raise data.num_documents, "
        "which all devices share.",
    )

    def make(params):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if training.optimizer.ema_decay else None,
            recent=recent,
        )

    if mesh is None:
        return make(params)
    # What an optimiser keeps of a parameter lies at the parameter's path and has its shape.
    places = shardings.parameters(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=places, donate_argnums=0)(params)


def empty_recent(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch, batches: int) -> RecentDocuments:
    """A ring of so many batches like the one given, before the first."""
    return no_recent(jax.eval_shape(lambda p: encode(nnx.merge(graphdef, p), batch.documents), params), batches)


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    training: TrainingConfig,
    prefix: tuple[int, ...],
    state: TrainState | None = None,
) -> Callable[[TrainState, Batch, PhaseValues], tuple[TrainState, dict[str, jax.Array]]]:
    """The jit-compiled step; the state is donated. With `state`, on a mesh, results stay where its arrays lie."""

    def step(state: TrainState, batch: Batch, phase: PhaseValues):
        def loss_fn(params):
            return loss_and_metrics(nnx.merge(graphdef, params), batch, phase, prefix, training, state.recent)

        (_, (metrics, recent)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = training.optimizer.ema_decay
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params) if decay else None
        metrics["grad_norm"] = optax.tree.norm(grads)
        return dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema, recent=recent
        ), metrics

    if state is None:
        return jax.jit(step, donate_argnums=0)
    places = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, jax.NamedSharding(state.step.sharding.mesh, jax.P())))
