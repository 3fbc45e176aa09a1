"""A request of OpenAI's chat completions, read into a question and how it is to be asked."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from msa_jax.errors import ConfigError
from msa_jax.inference.settings import AskConfig
from msa_jax.serve.errors import ApiError, shown
from msa_jax.serve.fields import Count, Fields, Filled, read

_NOT_NEGATIVE = Annotated[float, Field(ge=0)]
_ZERO = Annotated[float, Field(ge=0, le=0)]
_EMPTY = Annotated[list, Field(max_length=0)]


class Neutral(Fields):
    """Fields that are accepted only when they ask for nothing, as the answer would be another one."""

    n: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: _ZERO | None = None
    presence_penalty: _ZERO | None = None
    frequency_penalty: _ZERO | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: _EMPTY | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: _EMPTY | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


class ChatBody(Neutral):
    """The whole body. What begins with `messages` is read; the last eight are accepted whatever they say."""

    model: str | None = None
    messages: Annotated[list, Field(min_length=1)]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    temperature: _NOT_NEGATIVE | None = None
    top_p: _NOT_NEGATIVE | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: Annotated[
        Annotated[list[Filled], Field(max_length=4)] | None,
        BeforeValidator(lambda x: [x] if isinstance(x, str) else x),
    ] = None
    msa: dict[str, Any] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None


class Own(Fields):
    """Fields of this server's own, in the object "msa"."""

    mode: str | None = None
    rounds: Count | None = None
    documents: Count | None = None
    document_tokens: Count | None = None
    turn_tokens: Count | None = None
    router_documents: Count | None = None
    abstain_below: float | None = None
    namespaces: list[str] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    timeout: float | None = None


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: Any = None


class Message(Fields, extra="ignore"):
    """Of a message that is not the question nothing but the role is looked at."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]


class TextPart(Fields, extra="ignore"):
    type: Literal["text"]
    text: str


class LastMessage(Message):
    """The question: a string or parts of text."""

    role: Literal["user"]
    content: Annotated[
        list[TextPart], BeforeValidator(lambda x: [{"type": "text", "text": x}] if isinstance(x, str) else x)
    ]


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """What a request asks for.

    Attributes:
      question: the text of the last message.
      config: how it is asked.
      namespaces: that it names; None when it names none.
      stream: the answer comes as it is written.
      include_usage: a stream ends with the number of tokens.
      ignored_messages: messages before the last one, which are not read.
    """

    question: str
    config: AskConfig
    namespaces: tuple[str, ...] | None
    stream: bool
    include_usage: bool
    ignored_messages: int


def read_chat(value: Any, *, model: str, defaults: AskConfig, timeout: float) -> ChatRequest:
    """Read the body of a chat completion.

    Args:
      model: the name of the one model there is.
      defaults: what the request does not say.
      timeout: the most seconds it may ask for.

    Raises:
      ApiError: 404 for another model, 400 for a bad value or a field that is not understood.
    """
    try:
        body = read(ChatBody, value)
    except ApiError as e:
        name = (e.param or "").partition("[")[0].partition(".")[0]
        if name not in Neutral.model_fields:
            raise
        said = f"{name} {shown(value[name])} is not supported: leave it out."
        raise ApiError(400, said, param=name, code="unsupported_parameter") from None
    if body.model not in (None, model):
        said = f"There is no model {shown(body.model)}: this server has {model!r}."
        raise ApiError(404, said, param="model", code="model_not_found")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams: set stream, or leave it out.", param="stream_options")
    old, new = body.max_tokens, body.max_completion_tokens
    if None not in (old, new) and old != new:
        raise ApiError(400, f"max_tokens is {old} and max_completion_tokens {new}: give one.", param="max_tokens")
    for i, message in enumerate(body.messages):
        read(Message, message, f"messages[{i}]")
    last = read(LastMessage, message, f"messages[{i}]")
    own = read(Own, body.msa or {}, "msa")
    try:
        config = _config(body, own, defaults, timeout)
    except ConfigError as e:
        raise ApiError(400, str(e)) from None
    return ChatRequest(
        question="\n".join(part.text for part in last.content),
        config=config,
        namespaces=None if own.namespaces is None else tuple(own.namespaces),
        stream=bool(body.stream),
        include_usage=bool(read(StreamOptions, body.stream_options or {}, "stream_options").include_usage),
        ignored_messages=i,
    )


def _config(body: ChatBody, own: Own, defaults: AskConfig, timeout: float) -> AskConfig:
    """`defaults` with what the request says."""
    # A question without a seed draws anew each time it is asked.
    seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
    sampling = _replace(defaults.sampling, temperature=body.temperature, top_p=body.top_p, top_k=own.top_k, seed=seed)
    budget = _replace(
        defaults.budget, rounds=own.rounds, documents=own.documents, document_tokens=own.document_tokens,
        turn_tokens=own.turn_tokens, answer_tokens=body.max_tokens or body.max_completion_tokens,
    )  # fmt: skip
    return _replace(
        defaults, mode=own.mode, router_documents=own.router_documents, abstain_below=own.abstain_below,
        stop=tuple(body.stop) if body.stop else None, sampling=sampling, budget=budget,
        timeout=timeout if own.timeout is None else min(own.timeout, timeout),
    )  # fmt: skip


def _replace(config: Any, **values: Any) -> Any:
    return dataclasses.replace(config, **{name: value for name, value in values.items() if value is not None})
