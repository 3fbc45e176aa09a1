"""Questions that are computed together, come and go at any time, and hear of it, against each alone."""

import dataclasses
import functools
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax.errors import ConfigError, QuestionError
from msa_jax.inference import AskConfig, Budget, EngineConfig, Sampling
from msa_jax.inference import request as request_module
from msa_jax.inference.batching import prefill_batch
from msa_jax.inference.corpus import View
from msa_jax.inference.engine import Engine
from tests.inference.scripted import Scripted, names
from tests.inference.small import ASK, BUDGET, CONTEXT, ENGINE, QUESTIONS, corpus_of, model_of, renderer

A, B, C, D, E = QUESTIONS
LONG = Budget(answer_tokens=17, turn_tokens=9, document_tokens=3)
CASES = [
    (A, ASK, None),
    (B, AskConfig(budget=LONG, sampling=Sampling(temperature=1.0, seed=3)), None),
    (C, AskConfig(mode="router", router_documents=2, budget=BUDGET), ("few",)),
    (D, AskConfig(mode="latent", budget=LONG, sampling=Sampling(temperature=0.8, top_k=5, seed=1)), ()),
    (E, AskConfig(mode="router", budget=LONG, sampling=Sampling(temperature=2.0, top_p=0.9, seed=2**32 - 1)), ["rest"]),
    (C, AskConfig(mode="latent", budget=BUDGET), ("rest", "few")),
    (A, AskConfig(mode="latent", budget=Budget(answer_tokens=1)), None),
]
SCRIPTS = {A: names(4) + names(30, 9), B: names(7)}


@functools.cache
def engine(kind):
    parts = model_of(), renderer(), corpus_of()
    if kind == "scripted":
        made = Scripted(*parts, dataclasses.replace(ENGINE, decode_steps=1))
        made.scripts = SCRIPTS
        return made
    return Engine(*parts, ENGINE if kind == "three" else EngineConfig(
        slots=1, context=CONTEXT, lengths=(40,), prefill_rows=1, decode_steps=5, reported_documents=3
    ))  # fmt: skip


def finish(engine):
    while engine.step():
        pass


def submit(engine, case, **kwargs):
    question, config, namespaces = case
    return engine.submit(question, config=config, namespaces=namespaces, **kwargs)


@functools.cache
def alone(case, script):
    one = engine("scripted" if script else "three")
    pending = submit(one, CASES[case])
    finish(one)
    return pending.result(timeout=0)


def same(got, want):
    for name in ("question", "text", "outcome", "prompt_tokens", "completion_tokens", "events"):
        assert getattr(got, name) == getattr(want, name), name
    no_score = lambda c: dataclasses.replace(c, score=None)  # noqa: E731
    assert list(map(no_score, got.citations)) == list(map(no_score, want.citations))
    assert len(got.rounds) == len(want.rounds)
    for one, other in zip(got.rounds, want.rounds, strict=True):
        for name in ("written", "computed", "why", "tokens"):
            assert getattr(one, name) == getattr(other, name), name
        np.testing.assert_array_equal(one.documents, other.documents)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["three", "one", "scripted"])
@settings(max_examples=12)
@given(arrivals=st.lists(st.tuples(st.integers(0, len(CASES) - 1), st.integers(0, 3)), min_size=2, max_size=7))
def test_together_is_as_alone(kind, arrivals):
    one, pending = engine(kind), []
    for case, steps in arrivals:
        pending.append(submit(one, CASES[case]))
        for _ in range(steps):
            one.step()
    finish(one)
    for (case, _), this in zip(arrivals, pending, strict=True):
        same(this.result(timeout=0), alone(case, kind == "scripted"))


def test_cases_differ_and_reach_what_they_are_meant_to():
    answers = [alone(i, False) for i in range(len(CASES))] + [alone(0, True), alone(1, True)]
    assert len({a.text for a in answers}) == len(answers)
    assert {len(a.rounds) for a in answers} == {1, 2, 3}
    assert {c.cut for a in answers for c in a.citations} == {True, False}
    assert {r.computed for a in answers for r in a.rounds} == {"all", "new"}


def test_views_of_before_and_after_the_bank_got_more_namespaces():
    state = types.SimpleNamespace(
        tokens=[1, 2], routing=[True, False], computed=0, first_round=True, completion_tokens=0
    )
    views = [View(np.ones(2, bool), seen=3), View(np.array([True, False, True]), seen=4)]
    batch = prefill_batch(
        [state, state], slots=[1, 0], views=views, sampling=[Sampling()] * 2, size=3, length=4, head=1, nobody=7,
        fresh=True, pad_id=9,
    )  # fmt: skip
    np.testing.assert_array_equal(batch.allowed, [[True, True, False], [True, False, True], [False] * 3])
    np.testing.assert_array_equal(batch.seen, [3, 4, 0])
    np.testing.assert_array_equal(batch.slots, [1, 0, 7])
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 9, 9]] * 2 + [[9] * 4])


def test_a_seed_decides():
    texts = set()
    for seed in (0, 1, 2, 1):
        config = AskConfig(mode="latent", budget=BUDGET, sampling=Sampling(temperature=1.0, seed=seed))
        (answer,) = engine("three").ask([A], config=config)
        texts.add(answer.text)
    assert len(texts) == 3


def test_cancelled_and_late_questions_leave_the_others_alone(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(request_module, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    one = engine("three")
    late = dataclasses.replace(CASES[4][1], timeout=5.0)
    cases = [CASES[0], CASES[3], (*CASES[4][:1], late, ("rest",)), CASES[2], CASES[5], (A, late, None), CASES[1]]
    pending = [submit(one, case) for case in cases]
    clock[0] += 1
    one.step()
    assert (one.running, one.waiting) == (3, 4)
    pending[1].cancel()  # runs
    pending[4].cancel()  # waits
    clock[0] += 5  # one that runs and one that waits
    one.step()
    assert [p.done() for p in pending] == [False, True, True, False, True, True, False]
    finish(one)
    outcomes = [p.result(timeout=0).outcome for p in pending]
    assert outcomes == ["cut", "cancelled", "timed_out", "cut", "cancelled", "timed_out", "cut"]
    for i, case in ((0, 0), (3, 2), (6, 1)):
        same(pending[i].result(), alone(case, False))
    ran, waited = pending[1].result(), pending[4].result()
    assert alone(3, False).text.startswith(ran.text) and ran.text and len(ran.rounds) == 1
    assert (waited.text, waited.rounds, waited.waited, waited.seconds) == ("", (), 6.0, 6.0)
    assert (ran.waited, ran.first_token, ran.seconds) == (1.0, 1.0, 6.0)
    pending[0].cancel()  # it is over
    assert pending[0].result().outcome == "cut"


def test_no_answer_within_a_time():
    pending = submit(engine("three"), CASES[0])
    with pytest.raises(TimeoutError, match="no answer within 0.01 seconds"):
        pending.result(timeout=0.01)
    finish(engine("three"))
    assert pending.result(timeout=0).outcome == "cut"


@pytest.mark.parametrize("script", [True, False])
def test_what_a_listener_hears(script):
    one = engine("scripted" if script else "three")
    heard = [[] for _ in CASES]
    pending = [submit(one, case, listener=events.append) for case, events in zip(CASES, heard, strict=True)]
    finish(one)
    for this, events in zip(pending, heard, strict=True):
        answer = this.result(timeout=0)
        kinds = ["citation" if e.citation else "text" if e.text else "answer" for e in events]
        assert kinds == sorted(kinds, key=["citation", "text", "answer"].index)
        assert kinds.count("answer") == 1 and events[-1].answer is answer
        assert tuple(e.citation for e in events if e.citation) == answer.citations
        assert "".join(e.text for e in events) == answer.text
        assert kinds.count("text") > 1 or len(answer.text) < 2 or answer.completion_tokens < 4


def test_a_listener_that_fails_is_heard_of_no_more_and_hurts_nobody(caplog):
    one, calls = engine("three"), []

    def fails(event):
        calls.append(event)
        raise ZeroDivisionError("listener")

    pending = [submit(one, CASES[2], listener=fails), submit(one, CASES[0])]
    finish(one)
    same(pending[0].result(timeout=0), alone(2, False))
    same(pending[1].result(timeout=0), alone(0, False))
    assert len(calls) == 1 and "a listener failed" in caplog.text


def test_stop_strings_end_an_answer():
    one = engine("three")
    for case in (0, 2, 3):
        whole = alone(case, False).text
        stops = {whole[at : at + size] for at in range(1, len(whole) - 1, 2) for size in (1, 3)}
        for stop in sorted(stop for stop in stops if stop.strip("\ufffd ")):
            heard = []
            question, config, namespaces = CASES[case]
            config = dataclasses.replace(config, stop=("never", stop))
            answer = submit(one, (question, config, namespaces), listener=heard.append)
            finish(one)
            answer = answer.result(timeout=0)
            assert stop not in answer.text and "".join(e.text for e in heard) == answer.text
            if stop in whole and "\ufffd" not in whole:
                assert (answer.text, answer.outcome) == (whole[: whole.index(stop)].rstrip(), "answered")


def test_stop_tokens_end_an_answer():
    one, (question, config, namespaces) = engine("three"), CASES[3]
    pending = submit(one, CASES[3])
    finish(one)
    written = pending._interleave.tokens[-pending.result(0).completion_tokens :]
    token = next(t for t in written[2:] if t not in written[:2])
    answer = submit(one, (question, dataclasses.replace(config, stop_tokens=(token,)), namespaces))
    finish(one)
    before = written[: written.index(token)]
    text = renderer().tokenizer.decode(before, skip_special=True).strip()
    assert (answer.result(0).text, answer.result(0).outcome) == (text, "answered")
    for bad in ((-1,), ("x",), [3]):
        with pytest.raises(ConfigError, match="stop_tokens must be"):
            dataclasses.replace(config, stop_tokens=bad)


def test_abstaining():
    want = alone(0, False)
    for below, outcome in ((want.score - 1e-3, "cut"), (want.score + 1e-3, "not_in_memory")):
        (got,) = engine("three").ask([A], config=dataclasses.replace(ASK, abstain_below=below))
        assert (got.outcome, got.score) == (outcome, want.score)
    assert got.text == renderer().tokenizer.template.not_found and got.completion_tokens == 0
    (none,) = engine("three").ask([A], config=dataclasses.replace(ASK, abstain_below=-9.0), namespaces=())
    assert (none.outcome, none.score) == ("not_in_memory", None)


@pytest.mark.parametrize(
    "question, kwargs, message",
    [
        (" \n", {}, "empty"),
        ("why " * 40, {}, r"need \d+ tokens and the context has 96"),
        (A, dict(config=AskConfig()), "lower answer_tokens"),
        (A, dict(namespaces=["none"]), "no namespace"),
    ],
)
def test_bad_questions_are_refused_at_once(question, kwargs, message):
    with pytest.raises(QuestionError, match=message):
        engine("three").submit(question, **(dict(config=ASK) | kwargs))
    assert engine("three").waiting == 0


def test_a_longest_question_has_room():
    text, config = "a", AskConfig(mode="latent", budget=BUDGET)
    while True:
        try:
            pending = engine("three").submit(text + " a", config=config)
        except QuestionError:
            break
        pending.cancel()
        text += " a"
    answers = list(engine("three").ask([text, A], config=config))
    finish(engine("three"))
    assert answers[0].completion_tokens == BUDGET.answer_tokens
    assert CONTEXT - 3 < answers[0].prompt_tokens + BUDGET.answer_tokens <= CONTEXT
    same(answers[1], next(engine("one").ask([A], config=config)))


def test_a_closed_engine():
    one = Engine(model_of(), renderer(), corpus_of(), ENGINE)
    pending = [submit(one, case) for case in (*CASES[:2], *CASES[3:5])]
    one.step()
    assert (one.running, one.waiting) == (3, 1)
    one.close()
    assert {p.result(timeout=0).outcome for p in pending} == {"cancelled"}
    assert not one.step()
    with pytest.raises(RuntimeError, match="closed"):
        submit(one, CASES[0])
