"""Training by single steps shows the model, token by token and role by role, what the engine feeds it."""

import dataclasses

import numpy as np
import pytest

from msa_jax.data import Question
from msa_jax.data.batch import ROUTING
from msa_jax.inference import AskConfig, Budget
from tests.inference.scripted import Scripted
from tests.inference.small import DOCUMENTS, ENGINE, QUESTIONS, library_of, model_of, renderer

CHAINS = [(7,), (9, 4), (30, 7, 4)]


def asked(question, supporting, answer, **changes):
    """[(tokens, which of them route)] before each token that a model writes which does all as it was taught."""
    written = [token for number in supporting for token in renderer().reference(number)]
    written += renderer().end_of_retrieve() + renderer().answer(answer)
    config = dataclasses.replace(ENGINE, slots=1, context=160, decode_steps=1)
    engine = Scripted(model_of(**changes), renderer(), library_of(**changes), config)
    engine.scripts[question] = written
    ask = AskConfig(budget=Budget(answer_tokens=len(renderer().answer(answer)) + 4, turn_tokens=14))
    (reply,) = engine.ask([question], config=ask)
    assert (reply.text, [c.number for c in reply.citations]) == (answer, list(supporting))
    return [(tokens, routing) for tokens, routing, *_ in engine.seen], written


@pytest.mark.parametrize("supporting", CHAINS, ids=len)
@pytest.mark.parametrize("bias", [False, True], ids=["", "biased"])
def test_every_target_of_every_step_stands_in_the_engines_context(supporting, bias, quick_compiles):
    question = Question("q", QUESTIONS[1], ("north",), tuple(f"d{n}" for n in supporting))
    contexts, written = asked(question.question, supporting, "north", router_bias=bias)
    documents = [(DOCUMENTS[n], n) for n in supporting]
    trained, learned = [], []
    for read in range(len(supporting) + 1):
        sample = renderer().step(question, documents, read)
        for i in np.flatnonzero(sample.weights):
            trained.append((sample.tokens[:i], [role == ROUTING for role in sample.roles[:i]]))
            learned.append(sample.tokens[i])
    assert learned == written
    assert trained == contexts


def test_a_refusal_is_what_a_question_is_asked_that_names_nothing(quick_compiles):
    question, says = Question("q", QUESTIONS[0], ("unused",), ("d4",)), renderer().tokenizer.template.not_found
    contexts, written = asked(question.question, (), says)
    sample = renderer().refusal(question)
    where = np.flatnonzero(sample.weights)
    assert [sample.tokens[i] for i in where] == written
    assert [(sample.tokens[:i], [r == ROUTING for r in sample.roles[:i]]) for i in where] == contexts
