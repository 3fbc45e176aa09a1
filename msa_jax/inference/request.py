"""A question that was handed in: who asked waits for it, hears of it, or takes it back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from msa_jax.inference.answer import Answer, Citation, Outcome, StreamEvent
from msa_jax.inference.corpus import Corpus, Original, View
from msa_jax.inference.interleave import Interleave
from msa_jax.inference.settings import AskConfig

_LOG = logging.getLogger(__name__)

Listener = Callable[[StreamEvent], None]


class Request:
    """A question in an engine. Methods without underscore may be called from any thread."""

    def __init__(
        self, question: str, namespaces: Sequence[str] | None, config: AskConfig, listener: Listener | None
    ):
        self._question, self._config, self._listener = question, config, listener
        self._namespaces = None if namespaces is None else tuple(namespaces)
        self._view: View | None = None
        self._over, self._cancelled = threading.Event(), threading.Event()
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._submitted = time.monotonic()
        self._begun: float | None = None
        self._first_token: float | None = None
        self._interleave: Interleave | None = None

    def cancel(self) -> None:
        """Give the question up: its outcome is "cancelled", unless it is over before that is noticed."""
        self._cancelled.set()

    def done(self) -> bool:
        """Whether there is an answer, or an error."""
        return self._over.is_set()

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the answer.

        Raises:
          TimeoutError: `timeout` seconds have passed; the question goes on.
          Exception: what stopped the engine.
        """
        if not self._over.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} seconds; the question goes on: `cancel` gives it up.")
        if self._error is not None:
            raise self._error
        return self._answer

    # For the engine, in its thread.

    def _late(self) -> Outcome | None:
        """Why it is to be given up, if it is."""
        if self._cancelled.is_set():
            return "cancelled"
        limit = self._config.timeout
        return "timed_out" if limit is not None and time.monotonic() - self._submitted > limit else None

    def _find(self, corpus: Corpus, number: int) -> Original | None:
        return corpus.find(number, self._view)

    def _begin(self, view: View) -> None:
        self._view = view
        self._begun = time.monotonic() - self._submitted

    def _tell(self, event: StreamEvent) -> None:
        if self._listener is None:
            return
        try:
            self._listener(event)
        except Exception:
            # Other questions are computed by the same thread.
            _LOG.exception("a listener failed and hears no more; its question goes on")
            self._listener = None

    def _read(self, citation: Citation) -> None:
        self._tell(StreamEvent(citation=citation))

    def _text(self, text: str) -> None:
        if self._first_token is None:
            self._first_token = time.monotonic() - self._submitted
        self._tell(StreamEvent(text=text))

    def _finish(self) -> None:
        state, seconds = self._interleave, time.monotonic() - self._submitted
        self._answer = Answer(
            question=self._question,
            text=state.reply.text,
            outcome=state.outcome,
            citations=tuple(state.citations),
            rounds=tuple(state.rounds),
            score=state.score,
            prompt_tokens=state.prompt_tokens,
            completion_tokens=state.completion_tokens,
            waited=seconds if self._begun is None else self._begun,
            first_token=self._first_token,
            seconds=seconds,
        )
        self._over.set()
        self._tell(StreamEvent(answer=self._answer))

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._over.set()
        self._tell(StreamEvent(error=error))
