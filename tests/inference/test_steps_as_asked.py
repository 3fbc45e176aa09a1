"""Training by single steps shows the model, token by token and role by role, what the engine feeds it."""

import functools

import numpy as np
import pytest

from msa_jax.data import Question
from msa_jax.data.batch import ROUTING
from msa_jax.inference import AskConfig, Budget
from tests.inference.dictated import Dictated
from tests.inference.small import DOCUMENTS, QUESTIONS, renderer

SAYS = renderer().tokenizer.template.not_found


class Watched(Dictated):
    """Keeps the context, and which of its tokens route, before each token that the model writes."""

    def _said(self, count):
        state = self._requests[0]._interleave
        self.contexts.append((list(state.tokens), list(state.routing)))
        return super()._said(count)


@functools.cache
def engine():
    return Watched(steps=1, context=160)


def asked(supporting, answer):
    """What a model writes that does all as it was taught, and the contexts before each token of it."""
    written = [token for number in supporting for token in renderer().reference(number)]
    written += renderer().end_of_retrieve() + renderer().answer(answer)
    engine().contexts = []
    config = AskConfig(budget=Budget(answer_tokens=len(renderer().answer(answer)), turn_tokens=14))
    reply, *_ = engine().tell(written, config)
    assert (reply.text, [c.number for c in reply.citations]) == (answer, list(supporting))
    return written, engine().contexts


def targets(sample):
    """The tokens that carry loss, and the contexts before each."""
    where = np.flatnonzero(sample.weights)
    routing = [role == ROUTING for role in sample.roles]
    return [sample.tokens[i] for i in where], [(sample.tokens[:i], routing[:i]) for i in where]


@pytest.mark.parametrize("supporting", [(7,), (9, 4), (30, 7, 4)], ids=len)
def test_every_target_of_every_step_stands_in_the_engines_context(supporting):
    question = Question("q", QUESTIONS[0], ("north",), tuple(f"d{n}" for n in supporting))
    documents = [(DOCUMENTS[n], n) for n in supporting]
    steps = [targets(renderer().step(question, documents, read)) for read in range(len(supporting) + 1)]
    assert tuple(sum(parts, []) for parts in zip(*steps, strict=True)) == asked(supporting, "north")


def test_a_refusal_is_what_the_engine_feeds_when_nothing_is_named():
    question = Question("q", QUESTIONS[0], ("unused",), ("d4",))
    assert targets(renderer().refusal(question)) == asked((), SAYS)
