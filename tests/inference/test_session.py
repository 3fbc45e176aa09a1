"""A session: many threads, errors, its end, and what is compiled."""

import dataclasses
import threading

import numpy as np
import pytest

from msa_jax.bank import MemoryStore
from msa_jax.errors import BankError, ConfigError
from msa_jax.inference import Budget, Session
from msa_jax.inference import session as session_module
from tests.inference.sessions import BASE, LATENT, LIMIT, READ, SINGLE, Held, stored, told
from tests.inference.small import ASK, DOCUMENTS, ENGINE, QUESTIONS, ROW, bank_of, encoder, model_of, renderer

Q = QUESTIONS[0]


def test_a_model_can_run_otherwise_than_in_training(tmp_path, monkeypatch):
    with MemoryStore.create(tmp_path / "bank", encoder().spec) as store:
        store.add(BASE, encoder())
    tokenizer, trained = renderer().tokenizer, []
    monkeypatch.setattr(session_module, "open_model", lambda **_: (trained[-1], tokenizer, ROW))

    def asked(k, **changes):
        trained.append(model_of(top_k_documents=k))
        where = dict(workdir="run", writable=True, engine=SINGLE, defaults=LATENT)
        with Session.open(tmp_path / "bank", **where, changes=changes) as session:
            return told(session.ask(Q))

    with pytest.raises(ConfigError, match="would change the parameters"):
        asked(2, num_heads=2)
    with pytest.raises(ConfigError, match=r"Unknown model settings \['topk'\]"):
        asked(2, topk=1)
    # The refused ones have let go of the bank.
    assert asked(2, top_k_documents=1) == asked(1) != asked(2)


def test_nothing_is_compiled_once_it_is_warm(opened, compiled):
    # Of a size that no other test has compiled.
    size = dataclasses.replace(ENGINE, slots=2, prefill_rows=1, reported_documents=2)
    session = opened([*BASE, stored("x", "of another", "other")], engine=size)
    compiled.clear()
    session.warm_up()
    assert len(compiled) > 4
    compiled.clear()
    for namespaces in (None, (), ["other"]):
        for config in (ASK, READ, LATENT):
            session.ask_many(QUESTIONS, config=config, namespaces=namespaces)
    assert not compiled
    session.add([stored("first", "the first text that is added")])  # compiles what writes it
    compiled.clear()
    session.ask_many(QUESTIONS, config=READ)
    session.add([stored("second", "a second one")])
    session.delete(["first"])
    assert session.ask(Q, config=READ).outcome == "cut"
    assert not compiled


@pytest.mark.parametrize("step", ["_prefill", "_decode_some"])
def test_an_error_reaches_those_who_asked_and_the_session_goes_on(opened, monkeypatch, step):
    session = opened()
    want = session.ask(Q)
    real, left = getattr(session._engine, step), [1]

    def fails(*args, **kwargs):
        result = real(*args, **kwargs)
        if left:
            left.pop()
            raise FloatingPointError("the device is on fire")
        return result

    monkeypatch.setattr(session._engine, step, fails)
    with pytest.raises(FloatingPointError, match="on fire"):
        session.ask(Q)
    assert told(session.ask(Q)) == told(want)
    left.append(1)
    with pytest.raises(FloatingPointError, match="on fire"):
        list(session.stream(Q))
    left.append(1)
    with pytest.raises(FloatingPointError, match="on fire"):
        session.ask_many(QUESTIONS)
    monkeypatch.undo()
    assert told(session.ask(Q)) == told(want)


def test_closing_gives_up_what_runs(opened, monkeypatch):
    session = opened()
    held = Held(session, monkeypatch)
    pending = [session.submit(q, config=LATENT) for q in QUESTIONS]
    stream = session.stream(Q)
    assert held.held.wait(LIMIT)
    held.go.set()
    monkeypatch.setattr(session._engine, "step", lambda: False)
    session.close()
    outcomes = [p.result(LIMIT).outcome for p in pending]
    assert set(outcomes) <= {"cancelled", "cut"} and outcomes[-1] == "cancelled"
    assert list(stream)[-1].answer.outcome == "cancelled"
    calls = (lambda: session.ask(Q), lambda: session.add(BASE), session.warm_up, session.refresh, session.list)
    for call in calls:
        with pytest.raises(RuntimeError, match="closed"):
            call()
    session.close()


def test_a_stream_that_is_left_gives_its_question_up(opened):
    session = opened()
    events = session.stream(Q, config=dataclasses.replace(LATENT, budget=Budget(answer_tokens=70)))
    assert next(events).text
    events.close()
    assert session.ask(Q).outcome == "cut"
    assert (session.stats().running, session.stats().waiting, session.stats().questions) == (0, 0, 2)


def test_a_bank_in_memory():
    parts = model_of(), renderer().tokenizer
    with Session(*parts, bank_of(), documents=DOCUMENTS, engine=SINGLE) as session:
        answers = session.ask_many(QUESTIONS, config=READ)
        assert {len(a.citations) for a in answers} <= {2, 3}
        assert (session.stats().documents, session.stats().questions) == (5, 5)
        for call in (lambda: session.add(BASE), lambda: session.get("d4"), lambda: list(session.list())):
            with pytest.raises(BankError, match="in memory"):
                call()
        assert told(session.ask(QUESTIONS[0], config=READ)) == told(answers[0])
    with pytest.raises(ValueError, match="has 5 documents and `documents` 4"):
        Session(*parts, bank_of(), documents={n: DOCUMENTS[n] for n in list(DOCUMENTS)[:4]})


def test_many_threads_at_once(opened):
    session = opened(engine=ENGINE)
    threads, errors, start = [], [], threading.Barrier(16)

    def guarded(work, *args):
        try:
            start.wait(LIMIT)
            for i in range(4):
                work(i, *args)
        except BaseException as error:
            errors.append(error)

    def ask(i, who):
        answer = session.ask(QUESTIONS[(i + who) % 5], config=[READ, LATENT, ASK][who % 3])
        assert answer.outcome == "cut"

    def stream(i, who):
        events = session.stream(QUESTIONS[i], config=LATENT)
        if i % 2:
            events = list(events)
            assert "".join(e.text for e in events) == events[-1].answer.text
        else:
            next(events)
            events.close()

    def change(i, who):
        session.add([stored(f"{who} {i}", f"the river of {who} and {i}")])
        answer = session.ask(f"the river of {who} and {i}", config=dataclasses.replace(READ, router_documents=9))
        ours = session.get(f"{who} {i}")
        assert session.delete([ours.id]) == 1
        assert answer.outcome == "cut"
        assert all(c.id != ours.id for c in session.ask("river", config=READ).citations)

    def look(i, who):
        session.stats(), list(session.list()), session.explain(Q, documents=2)

    jobs = [ask] * 7 + [stream] * 4 + [change] * 3 + [look] * 2
    for who, job in enumerate(jobs):
        threads.append(threading.Thread(target=guarded, args=(job, who), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "stuck"
    assert not errors, errors
    stats = session.stats()
    assert (stats.running, stats.waiting, stats.documents) == (0, 0, len(BASE))
    np.testing.assert_equal(sorted(session.list()), sorted(("default", d.id) for d in BASE))
