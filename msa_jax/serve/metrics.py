"""What Prometheus reads at /metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from msa_jax.inference.answer import Answer

log = logging.getLogger(__name__)
prometheus_client.disable_created_metrics()  # a series more of each, which nobody asked for

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
# Name here, name in `Session.stats()`, help.
_GAUGES = (
    ("msa_questions_waiting", "waiting", "Questions that wait for a slot."),
    ("msa_questions_running", "running", "Questions that are being answered."),
    ("msa_slots", "slots", "Questions that can be answered together."),
    ("msa_documents", "documents", "Documents in the bank that is asked."),
    ("msa_bank_version", "version", "Version of the bank that is asked."),
)


class _OfSession:
    """Gauges that are read when Prometheus asks."""

    def __init__(self, stats: Callable[[], Any]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._stats()
        except Exception:
            log.exception("the session's figures cannot be read")
            return
        if stats is None:
            return
        for name, attribute, text in _GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(stats, attribute))

    def describe(self) -> Iterator[Metric]:
        # Without it, registering would ask for the figures.
        for name, _, text in _GAUGES:
            yield GaugeMetricFamily(name, text)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, stats: Callable[[], Any]):
        """`stats` gives the session's figures, or None while there is no session."""
        self._registry = CollectorRegistry()
        common = dict(registry=self._registry)
        self._requests = Counter("msa_requests", "Requests served.", ("route", "method", "status"), **common)
        self._request_seconds = Histogram(
            "msa_request_seconds", "From a request's arrival to the end of its response.", ("route",),
            buckets=_SECONDS, **common,
        )  # fmt: skip
        self.in_flight = Gauge("msa_requests_in_flight", "Requests being served.", **common)
        self._questions = Counter("msa_questions", "Questions that ended.", ("outcome",), **common)
        histogram = dict(buckets=_SECONDS, **common)
        self._seconds = Histogram("msa_question_seconds", "From submission to the end of the answer.", **histogram)
        self._first = Histogram("msa_first_token_seconds", "From submission to the answer's first token.", **histogram)
        self._waited = Histogram("msa_waiting_seconds", "From submission until the question ran.", **histogram)
        self._prompt = Counter("msa_prompt_tokens", "Tokens put into contexts, documents' included.", **common)
        self._completion = Counter("msa_completion_tokens", "Tokens that the model wrote.", **common)
        self._registry.register(_OfSession(stats))

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request. `route` is the pattern, never a path: there must be few of them."""
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def answer(self, answer: Answer) -> None:
        """Count what became of a question."""
        self._questions.labels(answer.outcome).inc()
        self._seconds.observe(answer.seconds)
        self._waited.observe(answer.waited)
        if answer.first_token is not None:
            self._first.observe(answer.first_token)
        self._prompt.inc(answer.prompt_tokens)
        self._completion.inc(answer.completion_tokens)

    def failed(self) -> None:
        """Count a question that ended without an answer."""
        self._questions.labels("failed").inc()

    def text(self) -> bytes:
        """In Prometheus' text format. Asks the session, so call it in a thread."""
        return generate_latest(self._registry)
