"""What tests of sessions share: documents, a thread that is held between two steps, and what an answer tells."""

import dataclasses
import threading
import time

import numpy as np

from msa_jax.bank import BankDocument
from msa_jax.inference import AskConfig
from tests.inference.small import BUDGET, ENGINE, TEXTS

# One question at a time: of few shapes, where nothing is asked of more.
SINGLE = dataclasses.replace(ENGINE, slots=1)
LIMIT = 60.0  # seconds until a test is taken for stuck
READ = AskConfig(mode="router", router_documents=3, budget=BUDGET)
LATENT = AskConfig(mode="latent", budget=BUDGET)


def stored(identity, text, namespace="default"):
    return BankDocument(identity, text, title=f"Title {identity}", namespace=namespace)


BASE = [stored(f"d{number}", text) for number, text in TEXTS.items()]


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
    """Set when the function has returned."""
    done = threading.Event()

    def run():
        function()
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done


def meanwhile(held, session, change):
    """Make a change in another thread and let the session's go on once it is told of it; set when that is over."""
    done = in_thread(change)
    until = time.monotonic() + LIMIT
    while session._worker._tasks.empty() and time.monotonic() < until:
        time.sleep(0.001)
    assert not done.is_set()  # nothing changes in the middle of a step
    held.go.set()
    return done


def cited(answer):
    return {(c.namespace, c.id) for c in answer.citations}


def told(answer, *, exactly=False):
    """All of an answer that does not tell the time; scores to rounding, which differs by what is computed together."""
    near = lambda x: x if x is None or exactly else np.round(x, 4).tolist()  # noqa: E731
    rounds = [(r.documents.tolist(), near(r.scores.tolist()), r.written, r.events, r.computed) for r in answer.rounds]
    citations = [dataclasses.replace(c, score=near(c.score)) for c in answer.citations]
    return answer.text, answer.outcome, citations, rounds, near(answer.score), answer.completion_tokens
