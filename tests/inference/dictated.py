"""An engine that computes nothing: it keeps what its slots would hold, and writes what it is told."""

import dataclasses

import numpy as np

from msa_jax.inference.answer import StreamEvent
from msa_jax.inference.engine import Engine
from msa_jax.inference.programs import Prefilled
from msa_jax.routing import NO_SCORE
from tests.inference.small import CONTEXT, ENGINE, QUESTIONS, corpus_of, model_of, renderer

SCORES = np.array([[0.1, 0.5, 0.4, -0.2, 0.3], [0.3, 0.7, 0.2, -0.4, 0.1]], np.float32)  # of 4, 7, 9, 12, 30
REPORTED = ENGINE.reported_documents


@dataclasses.dataclass
class Computed:
    """One turn: the tokens from `begin` on, those of them that route, None if nothing does, and whether it is fresh."""

    begin: int
    tokens: list[int]
    routed: list[int] | None
    fresh: bool


class Dictated(Engine):
    """Asks one question at a time.

    Attributes:
      turns: `Computed`, of the last question.
      changes: of each routing that is not fresh, whether other documents are selected than before; behind them none.
    """

    def __init__(self, steps=3, context=CONTEXT):
        self.turns, self.changes, self.script, self.held = [], [], [], []
        config = dataclasses.replace(ENGINE, slots=1, context=context, decode_steps=steps)
        super().__init__(model_of(), renderer(), corpus_of(), config)

    def renew(self):
        self._device = None

    def tell(self, script, config, *, changes=(), namespaces=None):
        """The answer of a model that writes `script`, then one word over and over; and what was heard."""
        self.turns, self.changes, self.script, self.held = [], list(changes), list(script), []
        heard: list[StreamEvent] = []
        pending = self.submit(QUESTIONS[0], config=config, namespaces=namespaces, listener=heard.append)
        for _ in range(200):
            if not self.step():
                return pending.result(timeout=0), heard, pending._interleave
        raise AssertionError("it does not end")

    def _said(self, count):
        """What the model writes after `count` tokens of its own."""
        return self.script[count] if count < len(self.script) else renderer().tokenizer.encode(" the")[0]

    def _holds(self, state):
        # What was computed stands as it was, whatever was forgotten or added behind it.
        assert self.held[: state.computed] == state.tokens[: state.computed]
        assert len(state.tokens) <= self.config.context

    def _prefill(self, batch, *, fresh, routes):
        state, head = self._requests[0]._interleave, self._head
        begin, size = int(batch.begin[0]) - head, int(batch.lengths[0])
        tokens = batch.tokens[0, :size].tolist()
        assert begin == (0 if fresh else state.computed) and begin <= len(self.held)
        self._holds(state)
        self.held = self.held[:begin] + tokens
        assert self.held == state.tokens
        routed = batch.tokens[0, :size][batch.route[0, :size]].tolist()
        self.turns.append(Computed(begin, tokens, routed if routes else None, fresh))
        if not routes:
            return Prefilled([self._said(state.completion_tokens)], None, None, None, None)
        visible = batch.allowed[0][self.corpus.space]
        scores = np.where(visible, SCORES, np.float32(NO_SCORE))
        documents = np.argsort(-scores, axis=1)[:, :REPORTED]
        same = np.ones((2, 1), bool)
        if not fresh and self.changes:
            same[0, 0] = not self.changes.pop(0)
        everyone = scores[:, documents.reshape(-1)][:, None]
        return Prefilled([self._said(state.completion_tokens)], None, same, documents[:, None], everyone)

    def _decode_some(self, states, sampling, *, longest):
        (state,) = states
        assert state.computed + 1 == len(state.tokens) and 0 < state.left and longest <= self.config.bucket(longest)
        self._holds(state)
        self.held = self.held[: state.computed]
        written, token = np.full((1, self.config.decode_steps), -1, np.int32), state.tokens[-1]
        for i in range(min(self.config.decode_steps, state.left)):
            self.held.append(int(token))
            token = written[0, i] = self._said(state.completion_tokens + i)
            if token in self._stops:
                break
        return written
