"""A session that answers what a script says, and remembers what it was asked."""

import contextlib
import dataclasses

import numpy as np

from msa_jax.ask import __main__ as command
from msa_jax.errors import QuestionError
from msa_jax.inference.answer import Answer, Citation, Event, Round, StreamEvent
from msa_jax.inference.explanation import Explained, Explanation, LayerMatch

CITATIONS = (
    Citation(4, "d4", "The river", "default", text="the river\nruns north", tokens=7, score=0.75),
    Citation(9, "d9", "", "towns", text="seven towns " * 20, tokens=5, cut=True),
)  # fmt: skip
ROUND = Round(
    documents=np.asarray([[4, 9, -1], [9, -1, -1]]),
    scores=np.asarray([[0.75, 0.5, -1e30], [0.25, -1e30, -1e30]], np.float32),
    written="[4][9]",
    events=(Event("read", 4), Event("cut", 9), Event("repeated")),
    computed="all",
    why="",
    tokens=31,
)


BASE = ["--workdir", "RUN", "--bank", "BANK"]


def run(*arguments):
    return command.main([*BASE, *arguments])


def answer(question, text="north, past 東京", **changes):
    made = Answer(
        question=question, text=text, outcome="answered", citations=CITATIONS, rounds=(ROUND,), score=0.5,
        prompt_tokens=40, completion_tokens=9, waited=0.25, first_token=0.5, seconds=1.5,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


NOT_FOUND = dict(text="The memory holds no answer.", outcome="not_in_memory", citations=(), rounds=(), score=0.125)


class Waiting:
    def __init__(self, session, answer):
        self.session, self.answer = session, answer

    def result(self, timeout=None):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def cancel(self):
        self.session.cancelled.append(self.answer)


class Session:
    """`answers` by question; "refuse" in a question refuses it, and in a stream an exception is raised half-way."""

    namespaces = ("a", "b", "towns")

    def __init__(self, answers=None):
        self.answers = answers or {}
        self.asked, self.explained, self.cancelled = [], [], []
        self.closed = self.stream_closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def _answer(self, question, namespaces, config):
        if "refuse" in question:
            raise QuestionError(f"the question {question!r}\nis refused.")
        self.asked.append((question, namespaces, config))
        return self.answers.get(question, answer(question))

    def submit(self, question, *, namespaces=None, config=None, listener=None):
        return Waiting(self, self._answer(question, namespaces, config))

    def stream(self, question, *, namespaces=None, config=None):
        found = self._answer(question, namespaces, config)
        self.events = self._events(found)  # kept, so that it ends when it is closed only
        return self.events

    def _events(self, found):
        try:
            if isinstance(found, BaseException):
                yield StreamEvent(text="nor")
                raise found
            for citation in found.citations:
                yield StreamEvent(citation=citation)
            if found.outcome != "not_in_memory":
                for begin in range(0, len(found.text), 3):
                    yield StreamEvent(text=found.text[begin : begin + 3])
            yield StreamEvent(answer=found)
        finally:
            self.stream_closed = True

    def explain(self, question, *, namespaces=None, documents=5):
        self.explained.append((question, namespaces))
        layers = (
            LayerMatch(layer=2, score=0.875, rank=1, chunk=0, passage="the river runs\x1b[2J north", token=" river"),
            LayerMatch(layer=3, score=0.5, rank=12, chunk=1, passage="grey lake", token="lake"),
        )
        one = Explained(4, "d4", "The river", "default", "the river runs north", 0.6875, layers)
        return Explanation(question, (one,))


@contextlib.contextmanager
def lines(*typed):
    """A `read` for a prompt, which raises what is an exception and ends after the last line."""
    left = list(typed)

    def read(prompt):
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    yield read
    assert left == []
