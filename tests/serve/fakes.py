"""A session that answers as a script says, in threads, and a server of it on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from msa_jax.bank import BankDocument
from msa_jax.bank.ingest import Report
from msa_jax.errors import BankError, QuestionError
from msa_jax.inference.answer import Answer, Citation, Event, Round, StreamEvent
from msa_jax.inference.explanation import Explained, Explanation, LayerMatch
from msa_jax.inference.settings import AskConfig
from msa_jax.serve.limits import Limits
from msa_jax.serve.running import bind, make_server
from msa_jax.serve.service import Service

# What the contract's servers hold (test_contract.py).
TEXTS = {"a": "one document of alpha", "b": "another one of alpha, a bit longer"}
DOCUMENTS = [*(BankDocument(i, t, f"Title {i}", "alpha") for i, t in TEXTS.items()),
             BankDocument("a", "what only beta may read", namespace="beta")]  # fmt: skip

# What a script does: says text, sleeps so many seconds, waits for a go, reads a document, fails; or "silent": it ends
# without a word.
Step = str | float | threading.Event | Citation | Exception
Script = Callable[[str], Iterable[Step]]


def words(question: str) -> list[Step]:
    """The script unless told otherwise: the question comes back word by word."""
    return [f"{word} " for word in question.split()]


@dataclasses.dataclass(frozen=True)
class Stats:
    waiting: int
    running: int
    slots: int
    documents: int
    version: int


class FakePending:
    def __init__(self, session: FakeSession, question, namespaces, config, listener):
        self.question, self.namespaces, self.config = question, namespaces, config
        self.cancelled, self._over = threading.Event(), threading.Event()
        self._session, self._listener = session, listener
        self._answer: Answer | None = None
        self._error: Exception | None = None
        self._submitted = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cancel(self):
        self.cancelled.set()

    def done(self):
        return self._over.is_set()

    def result(self, timeout=None):
        if not self._over.wait(timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._answer

    def _late(self):
        limit = self.config.timeout
        late = limit is not None and time.monotonic() - self._submitted > limit
        return "cancelled" if self.cancelled.is_set() else "timed_out" if late else None

    def _sleep(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._late() is None:
            self.cancelled.wait(min(0.005, seconds))

    def _run(self):
        session, text, citations, outcome = self._session, "", [], None
        while outcome is None and not session._free.acquire(timeout=0.005):
            outcome = self._late()
        held, tell = outcome is None, True
        for step in session.script(self.question):
            if outcome is None:
                outcome = self._late()
            if outcome is not None:
                break
            if isinstance(step, Exception):
                self._error = step
            elif step == "silent":
                tell = False
            elif isinstance(step, str):
                text += step
                self._listener(StreamEvent(text=step))
            elif isinstance(step, Citation):
                citations.append(step)
                self._listener(StreamEvent(citation=step))
            elif isinstance(step, threading.Event):
                while not step.is_set() and self._late() is None:
                    self._sleep(0.005)
            else:
                self._sleep(step)
        if held:
            session._free.release()
        if self._error is None:
            self._answer = self._made(text, citations, outcome or self._late() or session.outcome)
        self._over.set()
        if tell:
            self._listener(StreamEvent(answer=self._answer, error=self._error))

    def _made(self, text, citations, outcome):
        events = tuple(Event("read", c.number) for c in citations) + (Event("unknown", 987654),)
        one = Round(documents=None, scores=None, written="[987654]", events=events, computed="all", why="", tokens=5)
        seconds = time.monotonic() - self._submitted
        return Answer(
            question=self.question, text=text, outcome=outcome, citations=tuple(citations), rounds=(one,), score=0.5,
            prompt_tokens=11, completion_tokens=7, waited=0.0, first_token=seconds if text else None, seconds=seconds,
        )  # fmt: skip


class FakeSession:
    """Documents in a dictionary. Errors speak of everything there is, as a careless one might."""

    def __init__(
        self, documents: Iterable[BankDocument] = (), *, slots=4, script: Script = words, add_seconds=0.0, go=None
    ):
        self.documents = {(d.namespace, d.id): d for d in documents}
        self._free, self.slots, self.script, self.outcome = threading.Semaphore(slots), slots, script, "answered"
        self.submitted: list[FakePending] = []
        self.add_seconds, self.adding, self.most_adding, self.go = add_seconds, 0, 0, go
        self.version, self.emptied = 3, set()  # namespaces that had documents, as a bank knows them

    @property
    def namespaces(self):
        return tuple(sorted({namespace for namespace, _ in self.documents}))

    def submit(self, question, *, namespaces=None, config=None, listener=None):
        assert isinstance(config, AskConfig) and (namespaces is None or isinstance(namespaces, tuple))
        self._need(question, namespaces)
        self.submitted.append(FakePending(self, question, namespaces, config, listener))
        return self.submitted[-1]

    def _need(self, question, namespaces):
        if not question.strip():
            raise QuestionError("the question is empty: ask something.")
        if len(question) > 1500:
            raise QuestionError("the question has more tokens than the context: shorten the question.")
        if unknown := set(namespaces or ()) - set(self.namespaces) - self.emptied:
            raise QuestionError(f"no namespace {sorted(unknown)}: there are {self.namespaces}.")

    def explain(self, question, *, namespaces=None, documents=5):
        self._need(question, namespaces)
        found = [
            Explained(
                n, d.id, d.title, d.namespace, d.text, 0.5, (LayerMatch(2, 0.5, 1, 0, f"<[{n}]. {d.text}>", "word"),)
            )
            for n, d in enumerate(list(self.documents.values()))
            if namespaces is None or d.namespace in namespaces
        ]
        return Explanation(question, tuple(found[:documents]))

    def add(self, documents):
        documents, self.adding = list(documents), self.adding + 1
        self.most_adding = max(self.adding, self.most_adding)
        time.sleep(self.add_seconds)
        if self.go is not None:
            self.go.wait(20)
        self.adding -= 1
        for d in documents:
            if self.documents.get((d.namespace, d.id), d).text != d.text:
                raise BankError(f"the/bank: document {d.id!r} of namespace {d.namespace!r} is there with another text.")
            if len(d.text) > 300:
                raise BankError(f"the/bank: document {d.id!r} has 99 tokens and the limit is 64: split it.")
        before, self.version = len(self.documents), self.version + 1
        self.documents |= {(d.namespace, d.id): d for d in documents}
        added = len(self.documents) - before
        return Report(added=added, unchanged=len(documents) - added, encoded_tokens=3 * added)

    def update(self, documents):
        documents = list(documents)
        for d in documents:
            if (d.namespace, d.id) not in self.documents:
                raise BankError(f"no document {d.id!r} in namespace {d.namespace!r}: `add` it instead.")
        self.documents |= {(d.namespace, d.id): d for d in documents}
        self.version += 1
        return Report(added=len(documents))

    def delete(self, ids, namespace="default"):
        for identity in ids:
            del self.documents[namespace, identity]
        self.emptied.add(namespace)
        return len(ids)

    def get(self, identity, namespace="default"):
        if (namespace, identity) not in self.documents:
            raise KeyError(f"the/bank: no {identity!r} in {namespace!r}; there are {sorted(self.documents)}")
        return self.documents[namespace, identity]

    def list(self, namespace=None, prefix=""):
        for space, identity in list(self.documents):
            if namespace in (None, space) and identity.startswith(prefix):
                yield space, identity

    def stats(self):
        running = sum(not p.done() for p in self.submitted)
        return Stats(waiting=0, running=running, slots=self.slots, documents=len(self.documents), version=self.version)


class Reading(FakeSession):
    """Answers with every document of the namespaces that the question may read."""

    def submit(self, question, *, namespaces=None, config=None, listener=None):
        def script(_):
            for n, d in enumerate(list(self.documents.values())):
                if namespaces is None or d.namespace in namespaces:
                    yield Citation(n, d.id, d.title, d.namespace, d.text, 1)
                    yield d.text

        self.script = script
        self.outcome = "not_in_memory" if (config.abstain_below or 0) > 1 else "answered"
        return super().submit(question, namespaces=namespaces, config=config, listener=listener)


class Served:
    """A server in a thread of its own. Attributes: url, service, session."""

    def __init__(self, service: Service, session: FakeSession, port: int):
        self.service, self.session, self.port = service, session, port
        self.url = f"http://127.0.0.1:{port}"
        self.clients: list[openai.OpenAI] = []

    def openai(self, key="none", **options) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 20} | options)
        self.clients.append(client)
        return client

    def http(self, key=None, **options) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, **options)

    def chat(self, text: str, **more) -> httpx.Response:
        """One question, raw."""
        with self.http() as http:
            return http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}]} | more)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        with self.http() as http:
            families = text_string_to_metric_families(http.get("/metrics").text)
        found = [s for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(sample.value for sample in found)


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not (there := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return there


@contextlib.contextmanager
def serving(session: FakeSession | None = None, *, keys=None, limits=None, **options) -> Iterator[Served]:
    """A server of a session; it ends, with all it holds released, when the block does."""
    session = session or FakeSession()
    service = Service(
        model="fake", bank="the/bank", defaults=AskConfig(), limits=limits or Limits(grace=0.2), keys=keys,
        **dict(local=True, writable=True) | options,
    )  # fmt: skip
    service.start(session, session.slots)
    bound, log = bind("127.0.0.1", 0), []
    server = make_server(service)

    def run():
        try:
            asyncio.run(server.serve(sockets=[bound]), debug=False)
        except BaseException as e:
            log.append(e)

    port = bound.getsockname()[1]
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert eventually(lambda: server.started or bool(log))
    try:
        served = Served(service, session, port)
        yield served
        # Whatever happened, nothing is held for ever.
        for pending in session.submitted:
            if not eventually(pending.done):
                raise AssertionError(f"still running: {pending.question}")
        assert eventually(lambda: service.questions.taken == service.writes.taken == 0), "a gate is held"
        assert eventually(lambda: service.requests.taken == 0), "a request is held"
        assert not service.cancels
    finally:
        for pending in session.submitted:
            pending.cancel()
        for client in served.clients:
            client.close()
        service.draining = server.should_exit = True
        thread.join(10)
    assert not thread.is_alive() and log == []


def events_of(text: str) -> list:
    """Data of server-sent events."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
