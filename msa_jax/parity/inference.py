"""Recompute recorded inference: documents to a bank, questions over it, greedy decoding.

Sizes: B questions, T tokens a question as recorded, N documents, C chunks, k documents selected, K key/value
heads, D head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.context import Context, Route
from msa_jax.errors import DataError
from msa_jax.inference.programs import DecodeBatch, PrefillBatch, decode, prefill
from msa_jax.inference.sampling import from_settings
from msa_jax.inference.settings import Sampling
from msa_jax.inference.slots import Visibility, empty_slots
from msa_jax.memory import ChunkStates, DocumentLayout, MemoryBank
from msa_jax.parity.recording import TEMPLATE, Recording, compiled, document_chunks, pack, take
from msa_jax.parity.report import Report
from msa_jax.routing import l2_normalise


def routing_score_of(recording: Recording) -> str:
    """What the published inference code scores by: cosine only under the loss named exactly INFONCE."""
    return "cosine" if recording.msa.get("aux_loss_method", "INFONCE") == "INFONCE" else "dot"


def check_inference(recording: Recording) -> Report:
    """Compare the three stages and decoding.

    Raises:
      ValueError: the folder holds no usable recording.
    """
    model = recording.model(routing_score=routing_score_of(recording))
    report = Report(f"{recording.path}: inference")
    template, bank = _check_documents(report, recording, model)
    _check_questions(report, recording, model, template, bank)
    if "decode/input_tokens" in recording:
        _check_decoding(report, recording, model, template, bank)
    return report


def _ids(recording, name, vocab_size, *shape):
    ids = recording.array(name, *shape)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise DataError(f"{recording.path / 'io.npz'}: {name} must be below {vocab_size}.")
    return ids


def _jit(model, method):
    """`method(model, **arrays)`, compiled."""
    graphdef, params = nnx.split(model)
    run = compiled(lambda params, arrays: method(nnx.merge(graphdef, params), **arrays))
    return lambda **arrays: run(params, arrays)


def _check_documents(report, recording, model) -> tuple[Context | None, MemoryBank]:
    config = model.config
    ids = _ids(recording, "docs/input_ids", config.vocab_size, None)
    roles, positions = (recording.array(f"docs/{name}", ids.size) for name in ("doc_ids", "position_ids"))
    numbers = np.unique(roles[roles > 0])
    prefix = np.flatnonzero(roles == TEMPLATE)
    if not len(numbers) or len(prefix) + np.sum(roles > 0) != ids.size:
        raise DataError(f"{recording.path / 'io.npz'}: docs/doc_ids must be template tokens and documents.")

    rows = pack([np.flatnonzero(roles == n) for n in numbers], multiple=config.chunk_size)
    encode = _jit(model, lambda model, **kwargs: model.encode_documents(return_hidden=True, **kwargs))
    encoded = encode(
        tokens=take(ids, rows), segment_ids=(rows >= 0).astype(np.int32), positions=take(positions, rows)
    )
    hidden = np.full((config.num_layers + 1, ids.size, config.hidden_size), np.nan)
    hidden[:, rows[rows >= 0]] = np.asarray(encoded.hidden)[:, rows >= 0]
    template = None
    if len(prefix):
        run = _jit(model, lambda model, **kwargs: model.prefill(return_hidden=True, **kwargs))
        output = run(tokens=ids[None, prefix], positions=positions[None, prefix])
        template = Context(output.own, jnp.full(1, len(prefix)), jnp.full(1, config.position_offset))
        hidden[:, prefix] = output.all_hidden[:, 0]
    for i in range(config.num_layers + 1):
        report.activation(f"docs/hidden_{i}", hidden[i], recording.array(f"docs/hidden_{i}"))
    for i in range(config.num_layers if template is not None else 0):
        for name in ("k", "v"):
            ours = np.swapaxes(getattr(template.past, name)[i, 0], 0, 1)
            report.activation(f"template/{name}_{i}", ours, recording.array(f"template/{name}_{i}"))

    index, owners = document_chunks((rows >= 0).sum(1), rows.shape[1] // config.chunk_size, config.chunk_size)
    states = jax.tree.map(lambda x: x[:, index], encoded.states)
    _check_bank(report, recording, config.router_layers, states, numbers[owners])
    # Documents keep their numbers: the bank has room for one that is not there.
    layout = DocumentLayout.from_chunk_documents(numbers[owners] - 1, int(numbers[-1]))
    return template, model.bank(states, layout)


def _check_bank(report, recording, layers, states: ChunkStates, owners: np.ndarray) -> None:
    recorded = recording.array("bank/chunk_doc_ids", None)
    order = np.argsort(recorded, kind="stable")  # ours are in the order of document numbers
    report.equal("bank/chunk_doc_ids", owners, recorded[order])
    if not np.array_equal(owners, recorded[order]):
        return
    for i, layer in enumerate(layers):
        keys = states.routing_key[i]
        recorded = {
            name: recording.array(f"bank/{name}_{layer}", None, len(owners), None)[:, order]
            for name in ("k", "v", "router_k")
        }
        # The published cache holds them normalised where its loss is named INFONCE, and raw elsewhere.
        if np.allclose(np.linalg.norm(recorded["router_k"], axis=-1), 1.0, atol=1e-4):
            keys = l2_normalise(keys)
        for name, ours in (("k", states.content_k[i]), ("v", states.content_v[i]), ("router_k", keys)):
            report.activation(f"bank/{name}_{layer}", np.swapaxes(ours, 0, 1), recorded[name])


def _check_questions(report, recording, model, template, bank) -> None:
    config = model.config
    ids = _ids(recording, "query/input_ids", config.vocab_size, None, None)
    roles, exists, positions = (
        recording.array(f"query/{name}", *ids.shape) for name in ("doc_ids", "attention_mask", "position_ids")
    )
    exists = exists == 1
    if np.any(roles[exists] > 0) or not exists.any(1).all():
        raise DataError(f"{recording.path / 'io.npz'}: each question needs a token, and no document token.")
    # Without their padding, wherever that is, and back.
    order = np.argsort(~exists, axis=1, kind="stable")
    unpadded = lambda x: np.take_along_axis(x, order, axis=1)  # noqa: E731
    run = _jit(model, lambda model, **kwargs: _with_logits(model, model.prefill(return_hidden=True, **kwargs)))
    output, logits = run(
        tokens=unpadded(ids), lengths=exists.sum(1), positions=unpadded(positions), template=template,
        read=Route(bank, unpadded(roles) == 0, want=("scores",)),
    )  # fmt: skip
    places = np.argsort(order, axis=1)[..., None]
    hidden = np.take_along_axis(np.asarray(output.all_hidden), places[None], axis=2)
    logits = np.take_along_axis(np.asarray(logits), places, axis=1)
    for i in range(config.num_layers + 1):
        name = f"query/hidden_{i}"
        report.activation(name, hidden[i], recording.array(name), valid=exists)
    report.activation("query/logits", logits, recording.array("query/logits"), valid=exists)
    present = np.broadcast_to(np.asarray(bank.layout.lengths) > 0, (len(ids), bank.num_documents))
    for i, layer in enumerate(config.router_layers):
        scores = recording.array(f"query/doc_scores_{layer}")
        report.activation(f"query/doc_scores_{layer}", output.document_scores[i], scores, valid=present)
        documents, best = (recording.array(f"query/{name}_{layer}") for name in ("top_docs", "top_scores"))
        selected = np.asarray(output.selection.lengths[i]) > 0
        # Places beyond the documents that there are select nothing, here as there.
        width = selected.any(0).sum()
        report.equal(f"query/top_docs_{layer}", output.selection.documents[i, :, :width] + 1, documents)
        report.activation(f"query/top_scores_{layer}", output.selection.scores[i, :, :width], best)


def _with_logits(model, output):
    return output, model.logits(output.hidden)


def _check_decoding(report, recording, model, template, bank) -> None:
    """The recorded questions and steps through the programs that answer questions: a row of a cache each."""
    exists = recording.array("query/attention_mask") == 1
    ids, roles = recording.array("query/input_ids"), recording.array("query/doc_ids")
    batch, lengths = len(exists), exists.sum(1).astype(np.int32)
    tokens = _ids(recording, "decode/input_tokens", model.config.vocab_size, batch, None).astype(np.int32)
    steps, head = tokens.shape[1], 0 if template is None else template.size
    if not steps:
        return
    # Without their padding, wherever that is.
    order = np.argsort(~exists, axis=1, kind="stable")[:, : lengths.max()]
    unpadded = lambda x: np.take_along_axis(x, order, axis=1)  # noqa: E731
    graphdef, params = nnx.split(model)
    columns = head + int(lengths.max()) + steps + 1
    everything = Visibility(jnp.zeros(bank.num_documents, jnp.int32), jnp.zeros(bank.num_documents, jnp.int32))
    greedy = from_settings([Sampling()] * batch)

    def step_of(kept, new, count, begin, *, fresh):
        nothing = np.zeros(batch, np.int32)
        return prefill(
            graphdef, params, template, kept, bank, everything,
            PrefillBatch(
                slots=np.arange(batch, dtype=np.int32), tokens=new, lengths=count, begin=begin,
                route=unpadded(roles) == 0 if fresh else np.zeros(new.shape, bool), alone=np.full(batch, fresh),
                allowed=np.ones((batch, 1), bool), seen=nothing, sampling=greedy,
            ),
            fresh=fresh, routes=fresh, reported=1,
        )  # fmt: skip

    def ask():
        kept = empty_slots(model, template, bank, count=batch, size=columns)
        return step_of(kept, unpadded(ids).astype(np.int32), lengths, np.full(batch, head, np.int32), fresh=True)

    with jax.default_matmul_precision("highest"):
        kept, _ = ask()
        recorded = recording.array("decode/logits")
        logits = []
        for step in range(steps):
            kept, written = step_of(
                kept, tokens[:, step : step + 1], np.ones(batch, np.int32), head + lengths + step, fresh=False
            )
            logits.append(written.logits)
        report.activation("decode/logits", np.stack(logits, axis=1), recorded)
        best = recorded.argmax(-1)
        if np.array_equal(tokens[:, 1:], best[:, :-1]):  # the steps are the greedy ones
            now = DecodeBatch(
                token=tokens[:, 0], length=head + lengths, left=np.full(batch, steps + 1, np.int32), sampling=greedy
            )
            kept, _ = ask()
            _, chosen = decode(
                graphdef, params, kept, bank, now, columns=columns, steps=steps, stop_tokens=()
            )
            report.equal("decode/tokens", chosen, best)
