"""The state machine of Memory Interleave, on a model that writes what a script says."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.data import Document, Renderer, Template, Tokenizer
from msa_jax.data.batch import ROUTING
from msa_jax.inference import Generation, interleave

TEXTS = {4: "the river runs north", 7: "the stone is grey", 9: "the cloud is high"}
LIBRARY = {n: Document(str(n), "", text) for n, text in TEXTS.items()}
QUESTION = "where does the river run"


@pytest.fixture(scope="module")
def renderer():
    texts = [*TEXTS.values(), QUESTION, "north south"] * 4
    return Renderer(Tokenizer.train(texts, 420, Template.compact()))


@pytest.fixture(scope="module")
def model(renderer):
    config = MSAConfig.preset("tiny", vocab_size=renderer.tokenizer.vocab_size, hidden_size=16, mlp_size=16)
    return MSATransformer(config, rngs=nnx.Rngs(0))


@pytest.fixture
def play(renderer, model, monkeypatch):
    """Run one question against scripted turns; returns the answer and the contexts that were prefilled."""

    def run(*turns, **kwargs):
        contexts = []
        script = iter(turns)

        def scripted(graphdef, params, prefix, context, bank, *, max_new_tokens, stop_tokens):
            written = next(script)
            rows = np.full((context.tokens.shape[0], max_new_tokens), -1, np.int32)
            rows[0, : len(written)] = written[:max_new_tokens]
            size = int(context.mask[0].sum())
            contexts.append((np.asarray(context.tokens[0, :size]), np.asarray(context.roles[0, :size])))
            return Generation(tokens=jnp.asarray(rows), document_scores=None, selection=None)

        monkeypatch.setattr(sys.modules[interleave.__module__], "generate", scripted)
        answers = list(interleave(model, None, LIBRARY, [QUESTION], renderer, batch_size=2, **kwargs))
        assert len(answers) == 1 and next(script, None) is None
        return answers[0], contexts

    return run


def test_id_text_end_answer(renderer, play):
    answer, contexts = play(renderer.reference(4), renderer.end_of_retrieve(), renderer.answer("north"))
    assert (answer.text, answer.numbers, answer.unknown) == ("north", [4], [])
    assert (answer.rounds, answer.outcome) == (1, "answered")
    # Every round holds the one before; the text that comes back is the original one.
    for (before, _), (after, _) in zip(contexts, contexts[1:], strict=False):
        np.testing.assert_array_equal(after[: len(before)], before)
    assert TEXTS[4] in renderer.tokenizer.decode(contexts[1][0])
    assert renderer.tokenizer.decode(contexts[2][0]).count(QUESTION) == 2


def test_the_question_and_the_newest_text_route(renderer, play):
    turns = (renderer.reference(4), renderer.reference(7), renderer.end_of_retrieve(), renderer.answer("x"))
    answer, contexts = play(*turns)
    assert answer.numbers == [4, 7] and answer.rounds == 2
    prompt, prompt_roles = renderer.prompt(QUESTION)
    asked = len(prompt)
    routed = [
        renderer.tokenizer.decode(tokens[asked:][roles[asked:] == ROUTING]) for tokens, roles in contexts
    ]
    assert routed[0] == ""
    assert TEXTS[4] in routed[1]
    assert TEXTS[7] in routed[2] and TEXTS[4] not in routed[2]
    assert routed[3] == routed[2]  # ending retrieval is part of the same round
    for _, roles in contexts:
        np.testing.assert_array_equal(roles[:asked], prompt_roles)


def test_several_ids_in_one_turn(renderer, play):
    both = renderer.reference(4)[:-1] + renderer.reference(9)
    answer, contexts = play(both, renderer.end_of_retrieve(), renderer.answer("x"))
    assert answer.numbers == [4, 9] and answer.rounds == 1
    shown = renderer.tokenizer.decode(contexts[1][0])
    assert TEXTS[4] in shown and TEXTS[9] in shown


def test_unknown_id_ends_retrieval(renderer, play):
    answer, contexts = play(renderer.reference(5), renderer.answer("x"))
    assert (answer.numbers, answer.unknown, answer.rounds) == ([], [5], 0)
    assert answer.text == "x" and answer.outcome == "answered"
    assert len(contexts) == 2


def test_a_repeated_id_is_read_once(renderer, play):
    answer, _ = play(renderer.reference(4), renderer.reference(4), renderer.answer("x"))
    assert (answer.numbers, answer.rounds, answer.outcome) == ([4], 1, "answered")


def test_no_ids_at_all(renderer, play):
    answer, contexts = play(renderer.end_of_retrieve(), renderer.answer("x"))
    assert (answer.numbers, answer.rounds, answer.text) == ([], 0, "x")
    assert list(contexts[1][0]).count(renderer.end_of_retrieve()[0]) == 1


def test_malformed_output_ends_retrieval_once(renderer, play):
    stop = renderer.reference(4)[-1:]
    answer, contexts = play(renderer.tokenizer.encode("stone ")[:3] + stop, renderer.answer("x"))
    assert (answer.numbers, answer.unknown, answer.rounds) == ([], [], 0)
    assert list(contexts[1][0]).count(renderer.end_of_retrieve()[0]) == 1
    endless = [renderer.tokenizer.encode("stone")[0]] * 24
    answer, contexts = play(endless, renderer.answer("x"), max_new_tokens=24)
    assert answer.numbers == [] and answer.text == "x"


def test_rounds_run_out(renderer, play):
    answer, contexts = play(renderer.reference(4), renderer.answer("x"), max_rounds=1)
    assert (answer.numbers, answer.rounds, answer.outcome) == ([4], 1, "budget")
    assert answer.text == "x"
    assert list(contexts[1][0]).count(renderer.end_of_retrieve()[0]) == 1


def test_an_answer_without_end(renderer, play):
    answer, _ = play(renderer.end_of_retrieve(), renderer.answer("north")[:-1])
    assert answer.text == "north" and answer.outcome == "unfinished"


@pytest.mark.parametrize("name", ["max_rounds", "max_new_tokens", "batch_size"])
def test_budgets_below_one_are_refused(renderer, model, name):
    with pytest.raises(ValueError, match="at least 1"):
        list(interleave(model, None, LIBRARY, [QUESTION], renderer, **{name: 0}))
