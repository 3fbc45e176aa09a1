"""Documents that come and go while questions are asked, and whose they are."""

import dataclasses
import itertools
import threading

import pytest

from msa_jax.errors import BankError, QuestionError
from msa_jax.inference import Budget
from tests.inference.sessions import BASE, LATENT, LIMIT, READ, Held, cited, in_thread, meanwhile, stored, told
from tests.inference.small import ASK, ENGINE, QUESTIONS, TEXTS

Q = QUESTIONS[0]


def test_documents_that_come_while_a_question_runs(opened, monkeypatch):
    session = opened(BASE[:2], engine=ENGINE)
    before = session.ask(Q, config=LATENT)
    held = Held(session, monkeypatch)
    running = [session.submit(Q, config=LATENT) for _ in range(ENGINE.slots)]
    waiting = session.submit(Q, config=READ)
    assert held.held.wait(LIMIT)
    done = meanwhile(held, session, lambda: session.add([stored("new", "where does the river run now")]))
    assert done.wait(LIMIT)
    for pending in running:
        assert told(pending.result(LIMIT)) == told(before)
    assert ("default", "new") in cited(waiting.result(LIMIT))
    after = session.ask(Q, config=READ)
    assert cited(after) == {("default", name) for name in ("new", "d4", "d7")}
    assert session.ask("river", config=READ, namespaces=()).citations == ()


def test_a_running_question_reads_no_document_that_came_or_went_meanwhile(opened, monkeypatch):
    session = opened(BASE[:2])
    number = session.ask(Q, config=READ).citations[0].number
    held = Held(session, monkeypatch)
    pending = session.submit(Q, config=LATENT)
    assert held.held.wait(LIMIT)
    state = pending._interleave
    assert state._find(number) is not None
    done = meanwhile(held, session, lambda: (session.add([stored("new", "where")]), session.delete(["d4", "d7"])))
    pending.result(LIMIT)
    assert done.wait(LIMIT)
    assert state._find(number) is None
    late = session.ask(Q, config=READ)
    assert cited(late) == {("default", "new")}
    assert state._find(late.citations[0].number) is None
    assert {n for r in late.rounds for n in r.documents.flat} == {late.citations[0].number, -1}


def test_deleted_and_changed_documents(opened):
    session = opened()
    one = session.ask(Q, config=READ, namespaces=["default"])
    gone = one.citations[0].id
    assert session.delete([gone]) == 1
    assert ("default", gone) not in cited(session.ask(Q, config=READ))
    other = next(c.id for c in one.citations[1:])
    session.update([stored(other, Q + " now")])
    texts = {c.id: c.text for c in session.ask(Q, config=READ).citations}
    assert texts.get(other, Q + " now") == Q + " now"
    with pytest.raises(KeyError):
        session.get(gone)
    assert session.get(other).text == Q + " now"
    assert sorted(session.list(prefix="d")) == sorted(("default", d.id) for d in BASE if d.id != gone)
    assert session.stats().documents == len(BASE) - 1


def test_a_bank_that_is_outgrown_is_loaded_anew_when_nobody_runs(opened, monkeypatch):
    session = opened(BASE[:1], room=0.0)
    places = session._corpus.bank.num_chunks
    before = session.ask(Q, config=LATENT)
    held = Held(session, monkeypatch)
    running = session.submit(Q, config=LATENT)
    assert held.held.wait(LIMIT)
    many = [stored(f"m{i}", f"the cloud {i} is high over the mill and the river {i}") for i in range(places // 3)]
    waiting = [session.submit(question, config=READ) for question in QUESTIONS]
    done = meanwhile(held, session, lambda: session.add(many))
    assert told(running.result(LIMIT)) == told(before)
    assert done.wait(LIMIT)
    assert session._corpus.bank.num_chunks > places
    for pending in waiting:
        assert len(pending.result(LIMIT).citations) == 3 or pending.result(LIMIT).outcome == "cut"
    assert {i for _, i in cited(session.ask("cloud", config=READ))} - {"d4"}


def test_a_bank_that_was_compacted_is_loaded_anew(opened, monkeypatch):
    session = opened([stored("gone", "a text that goes"), *BASE])
    session.delete(["gone"])
    want = session.ask(Q, config=READ)
    held = Held(session, monkeypatch)
    running = session.submit(Q, config=READ)
    assert held.held.wait(LIMIT)
    session._store.compact()
    done = meanwhile(held, session, session.refresh)
    assert told(running.result(LIMIT)) == told(want)
    assert done.wait(LIMIT)
    assert cited(session.ask(Q, config=READ)) == cited(want)


def test_two_sessions_of_one_bank(opened):
    writer, reader = opened(), opened(writable=False)
    with pytest.raises(BankError, match="for reading"):
        reader.add([stored("new", "where")])
    writer.add([stored("new", Q)])
    assert ("default", "new") not in cited(reader.ask(Q, config=READ))
    reader.refresh()
    assert told(reader.ask(Q, config=READ)) == told(writer.ask(Q, config=READ))
    assert ("default", "new") in cited(reader.ask(Q, config=READ))


def test_what_is_in_other_namespaces_changes_nothing(opened):
    hidden = [stored(f"h{i}", text, "hidden") for i, text in enumerate([*QUESTIONS, *TEXTS.values()])]
    plain, both = opened(name="plain"), opened([*BASE, *hidden], name="both")
    for config, question in itertools.product((READ, LATENT, ASK), QUESTIONS):
        one, other = (s.ask(question, config=config, namespaces=["default"]) for s in (plain, both))
        assert told(one, exactly=True) == told(other, exactly=True)
    assert told(one) != told(both.ask(question, config=config))
    with pytest.raises(QuestionError, match="no namespace 'hidden'"):
        plain.ask(Q, namespaces=["hidden"])


def test_more_namespaces_than_there_was_room_for_while_a_question_waits(opened, monkeypatch):
    session = opened(BASE[:2])
    held = Held(session, monkeypatch)
    pending = [session.submit(Q, config=dataclasses.replace(READ, budget=Budget(answer_tokens=20)))]
    assert held.held.wait(LIMIT)
    done = meanwhile(held, session, lambda: session.add([stored(f"n{i}", "where", f"space {i:02}") for i in range(70)]))
    assert done.wait(LIMIT)
    pending.append(session.submit(Q, config=READ, namespaces=["space 69"]))
    assert [cited(p.result(LIMIT)) for p in pending] == [
        {("default", "d4"), ("default", "d7")}, {("space 69", "n69")}
    ]  # fmt: skip


def test_a_longer_document_than_all_before_with_content_off_the_device(opened, monkeypatch):
    session = opened(BASE[1:2], content="host")
    want = session.ask(Q, config=LATENT)
    held = Held(session, monkeypatch)
    running = session.submit(Q, config=LATENT)
    assert held.held.wait(LIMIT)
    longest = session._corpus.bank.layout.max_length
    done = meanwhile(held, session, lambda: session.add([stored("long", "the river " * 16)]))
    assert told(running.result(LIMIT)) == told(want)
    assert done.wait(LIMIT)
    assert session._corpus.bank.layout.max_length > longest
    assert cited(session.ask(Q, config=READ)) == {("default", "long"), ("default", "d7")}


def test_reading_the_bank_holds_up_changes_and_no_question(opened, monkeypatch):
    session = opened()
    explaining, go = threading.Event(), threading.Event()

    def slowly(*_, **__):
        explaining.set()
        assert go.wait(LIMIT)
        return "explained"

    monkeypatch.setattr("msa_jax.inference.session.explanation_of", slowly)
    explained = in_thread(lambda: session.explain(Q))
    assert explaining.wait(LIMIT)
    added = in_thread(lambda: session.add([stored("new", "where does the river run now")]))
    assert session.submit(Q, config=LATENT).result(LIMIT).outcome
    assert not added.wait(0.2) and not explained.is_set()
    go.set()
    assert explained.wait(LIMIT) and added.wait(LIMIT)
    assert ("default", "new") in set(session.list())
