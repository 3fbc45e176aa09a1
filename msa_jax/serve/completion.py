"""What became of a question, as OpenAI's chat completions and their chunks, with more under "msa"."""

from __future__ import annotations

import json
import math
import secrets
import time
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from msa_jax.inference.answer import Answer, Citation, Round
from msa_jax.serve.chat import ChatRequest
from msa_jax.serve.keys import Access

# OpenAI has no words for what ended before its time but these.
FINISH_REASONS = {
    "answered": "stop",
    "not_in_memory": "stop",
    "cut": "length",
    "timed_out": "length",
    "cancelled": "length",
}


def finite(value: float | None) -> float | None:
    """JSON has no infinities."""
    return None if value is None or not math.isfinite(value) else round(float(value), 6)


Figure = Annotated[float | None, BeforeValidator(finite)]


class Told(BaseModel):
    """What a response tells of an object, attribute by attribute: what is not named here is not told.

    So are the numbers of documents, which would tell how many documents other namespaces have.
    """

    model_config = ConfigDict(from_attributes=True)

    @classmethod
    def of(cls, value: Any, **more: Any) -> dict[str, Any]:
        """As a JSON object, with `more`."""
        return cls.model_validate(value).model_dump() | more


class ToldCitation(Told):
    id: str
    title: str
    namespace: str
    text: str
    tokens: int
    cut: bool
    score: Figure


class ToldRound(Told):
    computed: str
    why: str
    tokens: int


class ToldAnswer(Told):
    outcome: str
    score: Figure
    citations: list[ToldCitation]
    waited: Figure
    first_token: Figure
    seconds: Figure


def _round_dict(one: Round, ids: dict[int | None, dict[str, str]], access: Access) -> dict[str, Any]:
    values = ToldRound.of(one, events=[{"kind": event.kind} | ids.get(event.number, {}) for event in one.events])
    # The model writes numbers.
    return values if access.namespaces is not None else values | {"written": one.written}


class Completion:
    """The responses to one question."""

    def __init__(self, request: ChatRequest, access: Access, model: str):
        self._request, self._access, self._model = request, access, model
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id, "object": kind, "created": self._created, "model": self._model,
            "system_fingerprint": None, "choices": choices,
        }  # fmt: skip

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The response to a request that does not stream."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": FINISH_REASONS[answer.outcome]}
        return self._frame("chat.completion", [choice]) | {"usage": _usage(answer), "msa": self._msa(answer)}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._request.include_usage else {}
        return event_line(self._frame("chat.completion.chunk", [choice]) | usage | more)

    def first(self) -> str:
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, text: str) -> str:
        return self._chunk({"content": text})

    def citation(self, citation: Citation) -> str:
        """A document was read: an empty chunk that carries it."""
        return self._chunk({}, msa={"citation": ToldCitation.of(citation)})

    def last(self, answer: Answer) -> str:
        """All that follows the text."""
        lines = self._chunk({}, FINISH_REASONS[answer.outcome], msa=self._msa(answer))
        if self._request.include_usage:
            lines += event_line(self._frame("chat.completion.chunk", []) | {"usage": _usage(answer)})
        return lines + "data: [DONE]\n\n"

    def _msa(self, answer: Answer) -> dict[str, Any]:
        ids = {c.number: {"id": c.id, "namespace": c.namespace} for c in answer.citations}
        return ToldAnswer.of(
            answer,
            rounds=[_round_dict(one, ids, self._access) for one in answer.rounds],
            seed=self._request.config.sampling.seed,
            ignored_messages=self._request.ignored_messages,
        )


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def event_line(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
