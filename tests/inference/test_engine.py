"""What the engine computes, against passes over the whole context without a cache, token by token."""

import dataclasses

import numpy as np
import pytest

from msa_jax.inference import AskConfig, EngineConfig
from msa_jax.inference.corpus import FixedCorpus
from tests.inference.scripted import Scripted, full_pass, names
from tests.inference.small import ASK, BUDGET, CONTEXT, DOCUMENTS, ENGINE, QUESTIONS, corpus_of, model_of, renderer

ONE = dataclasses.replace(ENGINE, decode_steps=1)


END = renderer().end_of_retrieve()
# Turns of each question; behind the last one the model writes itself.
SCRIPTS = dict(
    zip(QUESTIONS, [names(4) + names(7) + END, names(7, 4), names(99), names(4) + names(99, 4), END], strict=True)
)
READ = [
    [("read", 4), ("read", 7)], [("read", 7), ("read", 4)], [("unknown", 99)], [("read", 4), ("unknown", 99)],
    [("none_named", None)],
]  # fmt: skip


def run(engine, scripts=SCRIPTS, config=ASK, namespaces=None):
    engine.scripts = scripts
    answers = list(engine.ask(QUESTIONS, config=config, namespaces=namespaces))
    # Every token that was computed is the one that a full pass gives; of some, no use was made.
    assert len(engine.seen) >= sum(a.completion_tokens for a in answers) > 20
    for tokens, routing, visible, own in engine.seen:
        logits, _ = full_pass(engine._model, tokens, routing, engine.corpus.bank, visible)
        best = np.sort(np.asarray(logits))[-2:]
        assert best[1] - best[0] > 1e-4, "a tie: choose other weights"
        assert int(np.argmax(logits)) == own, f"token {len(tokens)} of {tokens}"
    return answers


@pytest.mark.parametrize("namespaces", [None, ("few",)], ids=["some", "all that is visible"])
def test_every_token_is_that_of_one_pass_over_all_before_it(namespaces):
    answers = run(Scripted(model_of(), renderer(), corpus_of(), ONE), namespaces=namespaces)
    assert [[(e.kind, e.number) for e in a.events][:2] for a in answers] == READ
    rounds = [r for a in answers for r in a.rounds]
    assert {(r.computed, r.why) for a in answers for r in a.rounds[:1]} == {("all", "")}
    later = [r for a in answers for r in a.rounds[1:]]
    assert len(later) == 4
    if namespaces:
        # Where all is selected in any case, only what is new is computed.
        assert {(r.computed, r.why) for r in later} == {("new", "")}
        assert max(r.tokens for r in later) < 40
        assert {tuple(np.sort(layer[:2])) for r in rounds for layer in r.documents} == {(4, 7)}
        assert {n for r in rounds for n in r.documents[:, 2:].flat} == {-1}
    else:
        # What the last layer reads changes no token before; another layer's does.
        anew = [r for r in later if r.computed == "all"]
        assert {r.why for r in anew} == {"router layer 1 selects other documents than before"}
        assert min(r.tokens for r in anew) > max(r.tokens for r in later if r.computed == "new")


def test_modes_that_name_no_documents():
    engine = Scripted(model_of(), renderer(), corpus_of(), ONE)
    answers = run(engine, {}, AskConfig(mode="router", router_documents=2, budget=BUDGET))
    assert {len(a.citations) for a in answers} == {2} and {len(a.rounds) for a in answers} == {1}
    for answer in answers:
        mean = answer.rounds[0].scores[:, 0].mean()
        assert answer.citations[0].score == answer.score <= mean + 1e-6
    engine.seen.clear()
    run(engine, {}, AskConfig(mode="latent", budget=BUDGET))


def test_without_a_bank():
    config = EngineConfig(slots=1, context=CONTEXT, lengths=(), decode_steps=1)
    answers = run(Scripted(model_of(), renderer(), FixedCorpus(None, DOCUMENTS), config))
    assert [[(e.kind, e.number) for e in a.events][:2] for a in answers] == READ
    assert {a.score for a in answers} == {None}


def test_with_a_router_bias_all_is_computed_anew():
    biased = dict(router_bias=True, router_bias_init=2.0)
    config = dataclasses.replace(ONE, slots=1)
    engine = Scripted(model_of(**biased), renderer(), corpus_of(**biased), config)
    answers = run(engine, namespaces=("few",))
    assert {r.why[:15] for a in answers for r in a.rounds[1:]} == {"the router bias"}
