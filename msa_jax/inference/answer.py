"""What becomes of a question: the answer, what was read for it, and a trace of how."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

# answered: written to its end, or to a stop string. cut: `budget.answer_tokens` or the context ran out before that, or
# a token of retrieval broke it off.
# not_in_memory: the best router score is below `abstain_below`. timed_out, cancelled: given up, with what there was.
Outcome = Literal["answered", "cut", "not_in_memory", "timed_out", "cancelled"]

# What the trace tells of a turn, one each:
# read          a document's text was appended
# cut           ... but only so much of it as `document_tokens` or the context allows
# unknown       a number was named that no document has which the question may see
# repeated      a number was named whose text was read before
# malformed     a turn without any number that is spelt out, or without end within `turn_tokens`
# none_named    the model ended retrieval without having named a document
# no_room       a document was named and there is no room for its text in the context
# documents_spent, rounds_spent    the budget ran out; retrieval ended there
EventKind = Literal[
    "read", "cut", "unknown", "repeated", "malformed", "none_named", "no_room", "documents_spent", "rounds_spent"
]


@dataclasses.dataclass(frozen=True)
class Citation:
    """A document whose original text was read.

    Attributes:
      number: by which the model names it.
      id, title, namespace: of the document.
      text: what was read of it, as it stands in the document.
      tokens: of that text.
      cut: less than the whole text was read.
      score: router score when it was read, the mean over router layers; None when it was not among the best
        `EngineConfig.reported_documents` of every layer.
    """

    number: int
    id: str
    title: str
    namespace: str
    text: str
    tokens: int
    cut: bool = False
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happened in a round, as it is named above; `number` is the document's that it is about."""

    kind: EventKind
    number: int | None = None


@dataclasses.dataclass(frozen=True)
class Routing:
    """What a routing found, and what it took.

    Attributes:
      documents: [L_r, R] int64, numbers of the best documents of each router layer, -1 for none.
      scores: [L_r, R] float32, their scores.
      ranking: mean score over router layers by number, best first.
      selected: of those, the numbers that a router layer selected.
      tokens: how many were computed for it.
      why: why tokens were computed anew; empty if none were.
    """

    documents: np.ndarray
    scores: np.ndarray
    ranking: dict[int, float]
    selected: tuple[int, ...]
    tokens: int
    why: str


@dataclasses.dataclass(frozen=True)
class Round:
    """One routing and what the model wrote on its ground.

    Attributes:
      documents: [L_r, R] int64, numbers of the best documents of each router layer, -1 where there are fewer.
      scores: [L_r, R] float32, their router scores.
      written: what the model wrote in this round, until it named documents or ended retrieval.
      events: what became of it.
      computed: "all" tokens of the context, or "new" ones only.
      why: why all had to be computed; empty with "new" and in the first round.
      tokens: how many tokens passed the model before the first new one was written.
    """

    documents: np.ndarray
    scores: np.ndarray
    written: str
    events: tuple[Event, ...]
    computed: Literal["all", "new"]
    why: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of a question.

    Attributes:
      question: as asked.
      text: the answer, without the template's tokens.
      outcome: see `Outcome`.
      citations: the documents that were read, in order.
      rounds: one for every routing; the first is the question's own.
      score: router score of the best document, the mean over router layers; None without a bank.
      prompt_tokens, completion_tokens: tokens put into the context, and written by the model, ids included.
      waited, first_token, seconds: from submission until it began, until the answer's first token (None if there
        is none), and until its end.
    """

    question: str
    text: str
    outcome: Outcome
    citations: tuple[Citation, ...]
    rounds: tuple[Round, ...]
    score: float | None
    prompt_tokens: int
    completion_tokens: int
    waited: float
    first_token: float | None
    seconds: float

    @property
    def events(self) -> tuple[Event, ...]:
        """Of all rounds."""
        return tuple(event for one in self.rounds for event in one.events)


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """What a stream gives: `citation` when a document is read, `text` as the answer grows, `answer` at the end.

    `error`, at the end instead, is what stopped the engine.
    """

    citation: Citation | None = None
    text: str = ""
    answer: Answer | None = None
    error: BaseException | None = None
