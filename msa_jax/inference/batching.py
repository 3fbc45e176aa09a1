"""From questions in progress to the arrays of a compiled step, padded to a few sizes; and from those to numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from msa_jax.inference.answer import Routing
from msa_jax.inference.candidates import Candidates
from msa_jax.inference.corpus import Corpus, View
from msa_jax.inference.interleave import Interleave
from msa_jax.inference.programs import DecodeBatch, PrefillBatch, Prefilled
from msa_jax.inference.sampling import from_settings
from msa_jax.inference.settings import Sampling
from msa_jax.routing import NO_SCORE


def prefill_batch(
    states: Sequence[Interleave],
    *,
    slots: Sequence[int],
    views: Sequence[View],
    sampling: Sequence[Sampling],
    size: int,
    length: int,
    head: int,
    nobody: int,
    fresh: bool,
    pad_id: int,
) -> PrefillBatch:
    """The tokens to come of some questions, those of the whole context if `fresh`.

    Args:
      size: b, questions that the step has; places beyond those given get the slot `nobody`.
      length: T.
      head: tokens of the template prefix.
    """
    tokens = np.full((size, length), pad_id, np.int32)
    route = np.zeros((size, length), bool)
    lengths, begin = np.ones(size, np.int32), np.full(size, head, np.int32)
    for i, state in enumerate(states):
        first = 0 if fresh else state.computed
        new = state.tokens[first:]
        lengths[i], begin[i] = len(new), head + first
        tokens[i, : len(new)], route[i, : len(new)] = new, state.routing[first:]
    # Views are wider from the day on that the bank has more namespaces.
    allowed = np.zeros((size, max(len(view.allowed) for view in views)), bool)
    for i, view in enumerate(views[: len(states)]):
        allowed[i, : len(view.allowed)] = view.allowed
    spare = size - len(states)
    return PrefillBatch(
        slots=np.array([*slots, *[nobody] * spare], np.int32),
        tokens=tokens,
        lengths=lengths,
        begin=begin,
        route=route,
        alone=np.array([*(state.first_round for state in states), *[False] * spare]),
        allowed=allowed,
        seen=np.array([*(view.seen for view in views[: len(states)]), *[0] * spare], np.int32),
        sampling=from_settings(
            [*sampling, *[Sampling()] * spare], [*(state.completion_tokens for state in states), *[0] * spare]
        ),
    )


def no_prefill(view: View, *, size: int, length: int, head: int, nobody: int) -> PrefillBatch:
    """A prefill of no question, for compiling its shapes."""
    shapes = dict(size=size, length=length, head=head, nobody=nobody)
    return prefill_batch([], slots=[], views=[view], sampling=[], fresh=True, pad_id=0, **shapes)


def decode_batch(
    states: Sequence[Interleave | None], *, sampling: Sequence[Sampling], head: int,
    candidates: Callable[..., Candidates],
) -> DecodeBatch:  # fmt: skip
    """Where slots stand; None is one that is not decoding. `candidates`: made of numbers and of what is written."""
    numbers = [state.candidates if state else None for state in states]
    written = [state.written if state and some is not None else [] for state, some in zip(states, numbers, strict=True)]
    return DecodeBatch(
        token=np.array([state.tokens[-1] if state else 0 for state in states], np.int32),
        length=np.array([head + state.computed if state else 0 for state in states], np.int32),
        left=np.array([state.left if state else 0 for state in states], np.int32),
        sampling=from_settings(sampling, [state.completion_tokens if state else 0 for state in states]),
        candidates=candidates(numbers, written),
    )


def routing_of(written: Prefilled, place: int, corpus: Corpus, *, k: int, tokens: int, why: str) -> Routing:
    """What the routing of the question at `place` of a step found; a router layer selects k documents."""
    documents = np.asarray(written.documents[:, place])
    layers, reported = documents.shape
    scores = np.asarray(written.scores[:, place])  # [L_r, L_r * R]
    numbers = corpus.numbers(documents.reshape(-1))
    numbers[(scores <= NO_SCORE / 2).all(axis=0)] = -1
    mean = np.maximum(scores, -1.0).mean(axis=0)
    order = np.argsort(-mean, kind="stable")
    ranking = {int(numbers[i]): float(mean[i]) for i in order if numbers[i] >= 0}
    own = np.stack([scores[i, i * reported : (i + 1) * reported] for i in range(layers)])
    best = np.where(own > NO_SCORE / 2, numbers.reshape(layers, reported), -1)
    chosen = set(best[:, :k].flat)
    return Routing(
        documents=best,
        scores=own,
        ranking=ranking,
        selected=tuple(number for number in ranking if number in chosen),
        tokens=tokens,
        why=why,
    )


def no_routing(tokens: int) -> Routing:
    """Of a question without a bank."""
    return Routing(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32), {}, (), tokens, "")
