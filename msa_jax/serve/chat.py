"""A request of OpenAI's chat completions, read into a question and how it is to be asked."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from msa_jax.errors import ConfigError
from msa_jax.inference.settings import AskConfig
from msa_jax.serve.errors import ApiError, shown
from msa_jax.serve.fields import Fields

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Accepted whatever they say, as the answer would be the same.
HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
)  # fmt: skip
# Accepted only when they ask for nothing, as the answer would be another one.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
# Fields of this server's own, in the object "msa".
OWN = (
    "mode", "rounds", "documents", "document_tokens", "turn_tokens", "router_documents", "abstain_below", "namespaces",
    "top_k", "timeout",
)  # fmt: skip


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


def read_chat(body: Any, *, model: str, defaults: AskConfig, timeout: float) -> ChatRequest:
    """Read the body of a chat completion.

    Args:
      model: the name of the one model there is.
      defaults: what the request does not say.
      timeout: the most seconds it may ask for.

    Raises:
      ApiError: 404 for another model, 400 for a bad value or a field that is not understood.
    """
    fields = Fields(body)
    if (named := fields.string("model")) not in (None, model):
        raise ApiError(
            404, f"There is no model {shown(named)}: this server has {model!r}.", param="model", code="model_not_found"
        )
    question, ignored = _question(fields.items("messages"))
    stream = fields.boolean("stream") or False
    include_usage = _stream_options(fields.mapping("stream_options"), stream)
    own = Fields(fields.mapping("msa") or {}, "msa")
    try:
        config = _config(fields, own, defaults, timeout)
    except ConfigError as e:
        raise ApiError(400, str(e)) from None
    namespaces = own.strings("namespaces")
    own.done(OWN)
    for name in HARMLESS:
        fields.take(name)
    for name, neutral in NEUTRAL.items():
        value = fields.take(name)
        if value is not None and not any(
            value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral
        ):
            means = f" other than {' or '.join(map(repr, neutral))}" if neutral else ""
            raise ApiError(
                400, f"{name}{means} is not supported, got {shown(value)}: leave it out.",
                param=name, code="unsupported_parameter",
            )  # fmt: skip
    fields.done()
    return ChatRequest(question, config, namespaces, stream, include_usage, ignored)


def _question(messages: list[Any] | None) -> tuple[str, int]:
    """The text of the last message, and how many come before it."""
    if not messages:
        raise ApiError(400, "messages must hold at least one message, the user's question.", param="messages")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = Fields(message, where).string("role")
        if role not in ROLES:
            raise ApiError(
                400, f"{where}.role must be one of {', '.join(ROLES)}, got {shown(role)}.", param=f"{where}.role"
            )
    if role != "user":
        raise ApiError(
            400, f"The last message must be the user's question, got one of role {role!r}.", param=f"{where}.role"
        )
    content = messages[-1].get("content")
    if isinstance(content, str):
        return content, len(messages) - 1
    if not isinstance(content, list):
        raise ApiError(
            400, f"{where}.content must be a string or a list of parts, got {shown(content)}.", param=f"{where}.content"
        )
    texts = []
    for j, part in enumerate(content):
        place = f"{where}.content[{j}]"
        fields = Fields(part, place)
        if (kind := fields.take("type")) != "text":
            raise ApiError(400, f"{place}: only parts of type 'text' can be read, got {shown(kind)}.", param=place)
        if (text := fields.string("text")) is None:
            raise fields.refusal("text", "a string", text)
        texts.append(text)
    return "\n".join(texts), len(messages) - 1


def _stream_options(value: dict[str, Any] | None, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options is for streams: set stream, or leave it out.", param="stream_options")
    options = Fields(value, "stream_options")
    include_usage = options.boolean("include_usage") or False
    options.take("include_obfuscation")
    options.done(("include_usage",))
    return include_usage


def _config(fields: Fields, own: Fields, defaults: AskConfig, timeout: float) -> AskConfig:
    """`defaults` with what the request says."""
    sampling: dict[str, Any] = dict(
        temperature=fields.number("temperature", least=0),
        top_p=fields.number("top_p", least=0),
        top_k=own.integer("top_k", least=0, most=2**31 - 1),
        seed=fields.integer("seed", least=-(2**63), most=2**63 - 1),
    )
    # A question without a seed draws anew each time it is asked.
    sampling["seed"] = secrets.randbits(32) if sampling["seed"] is None else sampling["seed"] % 2**32
    old, new = (fields.integer(name, least=1, most=2**31 - 1) for name in ("max_tokens", "max_completion_tokens"))
    if None not in (old, new) and old != new:
        raise ApiError(400, f"max_tokens is {old} and max_completion_tokens {new}: give one.", param="max_tokens")
    budget = {name: own.integer(name, least=1, most=2**31 - 1) for name in OWN[1:5]}
    budget["answer_tokens"] = new if old is None else old
    seconds = own.number("timeout")
    values = dict(
        mode=own.string("mode"),
        router_documents=own.integer("router_documents", least=1, most=2**31 - 1),
        abstain_below=own.number("abstain_below"),
        stop=_stop(fields),
        timeout=timeout if seconds is None else min(seconds, timeout),
    )
    return _replace(
        defaults, **values, sampling=_replace(defaults.sampling, **sampling), budget=_replace(defaults.budget, **budget)
    )


def _replace(config: Any, **values: Any) -> Any:
    return dataclasses.replace(config, **{name: value for name, value in values.items() if value is not None})


def _stop(fields: Fields) -> tuple[str, ...] | None:
    value = fields.take("stop")
    texts = [value] if isinstance(value, str) else value
    if value is None or texts == []:
        return None
    good = isinstance(texts, list) and len(texts) <= 4 and all(isinstance(s, str) and s for s in texts)
    if not good:
        raise fields.refusal("stop", "a string, or a list of at most 4, none of them empty", value)
    return tuple(texts)
