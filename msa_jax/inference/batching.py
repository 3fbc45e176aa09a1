"""From conversations to the arrays of one compiled step, padded to a few sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from msa_jax.inference.candidates import Candidates
from msa_jax.inference.conversation import Conversation
from msa_jax.inference.library import View
from msa_jax.inference.programs import Current, Turn
from msa_jax.inference.sampling import from_settings
from msa_jax.inference.settings import Sampling


def turn_of(
    talks: Sequence[Conversation],
    *,
    rows: Sequence[int],
    views: Sequence[View],
    sampling: Sequence[Sampling],
    size: int,
    length: int,
    head: int,
    nobody: int,
    fresh: bool,
    pad_id: int,
) -> Turn:
    """The tokens to come of some questions, those of the whole context if `fresh`.

    Args:
      size: b, questions that the step has; places beyond those given get the row `nobody`.
      length: T.
      head: tokens of the template prefix.
    """
    tokens = np.full((size, length), pad_id, np.int32)
    route = np.zeros((size, length), bool)
    lengths, begin = np.ones(size, np.int32), np.full(size, head, np.int32)
    for i, talk in enumerate(talks):
        first = 0 if fresh else talk.computed
        new = talk.tokens[first:]
        lengths[i], begin[i] = len(new), head + first
        tokens[i, : len(new)], route[i, : len(new)] = new, talk.routing[first:]
    # Views are wider from the day on that the bank has more namespaces.
    allowed = np.zeros((size, max(len(view.allowed) for view in views)), bool)
    for i, view in enumerate(views[: len(talks)]):
        allowed[i, : len(view.allowed)] = view.allowed
    spare = size - len(talks)
    return Turn(
        rows=np.array([*rows, *[nobody] * spare], np.int32),
        tokens=tokens,
        lengths=lengths,
        begin=begin,
        route=route,
        alone=np.array([*(talk.first_round for talk in talks), *[False] * spare]),
        allowed=allowed,
        seen=np.array([*(view.seen for view in views[: len(talks)]), *[0] * spare], np.int32),
        sampling=from_settings(
            [*sampling, *[Sampling()] * spare], [*(talk.completion_tokens for talk in talks), *[0] * spare]
        ),
    )


def no_turn(view: View, *, size: int, length: int, head: int, nobody: int) -> Turn:
    """A turn of no question, for compiling its shapes."""
    shapes = dict(size=size, length=length, head=head, nobody=nobody)
    return turn_of([], rows=[], views=[view], sampling=[], fresh=True, pad_id=0, **shapes)


def current_of(
    talks: Sequence[Conversation | None], *, sampling: Sequence[Sampling], head: int,
    candidates: Callable[..., Candidates],
) -> Current:  # fmt: skip
    """Where rows stand; None is a row that is not decoding. `candidates`: made of numbers and of what is written."""
    numbers = [talk.candidates if talk else None for talk in talks]
    written = [talk.written if talk and some is not None else [] for talk, some in zip(talks, numbers, strict=True)]
    return Current(
        token=np.array([talk.tokens[-1] if talk else 0 for talk in talks], np.int32),
        length=np.array([head + talk.computed if talk else 0 for talk in talks], np.int32),
        left=np.array([talk.left if talk else 0 for talk in talks], np.int32),
        sampling=from_settings(sampling, [talk.completion_tokens if talk else 0 for talk in talks]),
        candidates=candidates(numbers, written),
    )
