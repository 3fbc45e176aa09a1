"""A session: many threads, documents that come and go meanwhile, errors, and what is compiled."""

import contextlib
import dataclasses
import threading

import jax
import numpy as np
import pytest

from msa_jax.bank import BankDocument, BankError, MemoryStore
from msa_jax.inference import AskConfig, Budget, QuestionError, Session
from tests.inference.small import ASK, BUDGET, DOCUMENTS, ENGINE, QUESTIONS, TEXTS, bank_of, encoder, model_of, renderer

pytestmark = pytest.mark.usefixtures("quick_compiles")
LIMIT = 60.0  # seconds until a test is taken for stuck
READ = AskConfig(mode="router", router_documents=3, budget=BUDGET)
LATENT = AskConfig(mode="latent", budget=BUDGET)
Q = QUESTIONS[0]


def stored(identity, text, namespace="default"):
    return BankDocument(identity, text, title=f"Title {identity}", namespace=namespace)


BASE = [stored(f"d{number}", text) for number, text in TEXTS.items()]


@pytest.fixture
def opened(tmp_path):
    """Makes sessions of a bank on disk; `room` and so on are options of loading."""
    with contextlib.ExitStack() as stack:

        def make(documents=BASE, writable=True, name="bank", engine=ENGINE, **loading):
            path = tmp_path / name
            if not path.exists():
                with MemoryStore.create(path, encoder().spec) as store:
                    store.add(documents, encoder())
            store = MemoryStore(path, writable=writable)
            session = Session(
                model_of(), renderer().tokenizer, store, encoder=encoder(), engine=engine, defaults=ASK,
                loading=dict(room=2.0) | loading,
            )  # fmt: skip
            return stack.enter_context(session)

        yield make


class Held:
    """Holds a session's thread between two steps, when a question has begun, until it is let go."""

    def __init__(self, session, monkeypatch):
        self.step, self.held, self.go = session._engine.step, threading.Event(), threading.Event()
        monkeypatch.setattr(session._engine, "step", self._step)

    def _step(self):
        worked = self.step()
        if worked and not self.go.is_set():
            self.held.set()
            assert self.go.wait(LIMIT)
        return worked


def in_thread(function):
    done = threading.Event()
    result = []

    def run():
        result.append(function())
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done, result


def cited(answer):
    return {(c.namespace, c.id) for c in answer.citations}


def told(answer, *, exactly=False):
    """All of an answer that does not tell the time; scores to rounding, which differs by what is computed together."""
    near = lambda x: x if x is None or exactly else np.round(x, 4).tolist()  # noqa: E731
    rounds = [(r.documents.tolist(), near(r.scores.tolist()), r.written, r.events, r.computed) for r in answer.rounds]
    citations = [dataclasses.replace(c, score=near(c.score)) for c in answer.citations]
    return answer.text, answer.outcome, citations, rounds, near(answer.score), answer.completion_tokens


def test_nothing_is_compiled_once_it_is_warm(opened):
    session = opened([*BASE, stored("x", "of another", "other")])
    counted = [0]

    def count(event, duration, **_):
        counted[0] += "backend_compile" in event

    jax.monitoring.register_event_duration_secs_listener(count)
    session.warm_up()
    assert counted[0] > 4
    session.ask(Q)
    session.add([stored("first", "the first text that is added")])
    counted[0] = 0
    for namespaces in (None, (), ["other"]):
        for config in (ASK, READ, LATENT):
            session.ask_many(QUESTIONS, config=config, namespaces=namespaces)
    session.add([stored("second", "a second one")])
    session.ask_many(QUESTIONS, config=READ)
    session.delete(["first"])
    assert session.ask(Q, config=READ).outcome == "cut"
    assert counted[0] == 0


def test_documents_that_come_while_a_question_runs(opened, monkeypatch):
    session = opened(BASE[:2])
    before = session.ask(Q, config=LATENT)
    held = Held(session, monkeypatch)
    running = [session.submit(Q, config=LATENT) for _ in range(ENGINE.slots)]
    waiting = session.submit(Q, config=READ)
    assert held.held.wait(LIMIT)
    done, _ = in_thread(lambda: session.add([stored("new", "where does the river run now")]))
    assert not done.wait(0.2)  # nothing changes in the middle of a step
    held.go.set()
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
    talk = pending._conversation
    assert talk._find(number) is not None
    done, _ = in_thread(lambda: (session.add([stored("new", "where")]), session.delete(["d4", "d7"])))
    held.go.set()
    pending.result(LIMIT)
    assert done.wait(LIMIT)
    assert talk._find(number) is None
    late = session.ask(Q, config=READ)
    assert cited(late) == {("default", "new")}
    assert talk._find(late.citations[0].number) is None
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
    places = session._library.bank.num_chunks
    before = session.ask(Q, config=LATENT)
    held = Held(session, monkeypatch)
    running = session.submit(Q, config=LATENT)
    assert held.held.wait(LIMIT)
    many = [stored(f"m{i}", f"the cloud {i} is high over the mill and the river {i}") for i in range(places // 3)]
    done, _ = in_thread(lambda: session.add(many))
    waiting = [session.submit(question, config=READ) for question in QUESTIONS]
    held.go.set()
    assert told(running.result(LIMIT)) == told(before)
    assert done.wait(LIMIT)
    assert session._library.bank.num_chunks > places
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
    done, _ = in_thread(session.refresh)
    held.go.set()
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


@pytest.mark.parametrize("config", [READ, LATENT, ASK], ids=lambda c: c.mode)
def test_what_is_in_other_namespaces_changes_nothing(opened, config):
    hidden = [stored(f"h{i}", text, "hidden") for i, text in enumerate([*QUESTIONS, *TEXTS.values()])]
    plain, both = opened(name="plain"), opened([*BASE, *hidden], name="both")
    for question in QUESTIONS:
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
    done, _ = in_thread(lambda: session.add([stored(f"n{i}", "where", f"space {i:02}") for i in range(70)]))
    held.go.set()
    assert done.wait(LIMIT)
    pending.append(session.submit(Q, config=READ, namespaces=["space 69"]))
    assert [cited(p.result(LIMIT)) for p in pending] == [
        {("default", "d4"), ("default", "d7")}, {("space 69", "n69")}
    ]  # fmt: skip


@pytest.mark.parametrize("step", ["_take_turn", "_write_on"])
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
    parts, one = (model_of(), renderer().tokenizer), dataclasses.replace(ENGINE, slots=1)
    with Session(*parts, bank_of(), documents=DOCUMENTS, engine=one) as session:
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
    session = opened()
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
