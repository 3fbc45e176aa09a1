"""Answers for a terminal, as they are written, and as JSON."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import numpy as np

from msa_jax.inference.answer import Answer, Citation, Round, StreamEvent
from msa_jax.inference.explanation import Explanation

_ENDED = {
    "cut": "the tokens that it may have ran out here: raise --answer_tokens or --context",
    "timed_out": "given up when its time ran out: raise --timeout",
    "cancelled": "given up",
}
# What else a reader should know of how an answer came about; the rest of the trace is for --json.
_EVENTS = {
    "unknown": "the model named {number}, a number that no document has which it may read",
    "malformed": "the model named nothing that is a number of a document",
    "none_named": "the model named no document",
    "no_room": "no room in the context for the text of a document: raise --context",
    "documents_spent": "no more documents were read: raise --documents",
    "rounds_spent": "no more was retrieved: raise --rounds",
}


def clean(text: str) -> str:
    """Text without control characters, with which a document could steer a terminal, and without lone surrogates."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def shorten(text: str, width: int) -> str:
    """The text on one line of at most `width` columns; wide characters take two."""
    line = " ".join(clean(text).split())
    columns = 0
    for i, c in enumerate(line):
        columns += _columns(c)
        if columns > width:
            while i and columns > width - 1:  # room for the dots
                columns -= _columns(line[i])
                i -= 1
            return line[: i + 1].rstrip() + "…"
    return line


def _columns(c: str) -> int:
    if unicodedata.combining(c):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def write_stream(events: Iterable[StreamEvent], out: TextIO) -> Answer:
    """Write the answer while it grows, and the end of the line."""
    shown, answer = "", None
    for event in events:
        if event.text:
            out.write(clean(event.text))
            out.flush()
            shown += event.text
        answer = event.answer or answer
    # What is no answer of the model's, such as that there is none, does not grow.
    out.write(clean(answer.text.removeprefix(shown)) + "\n")
    return answer


def write_end(answer: Answer, out: TextIO, width: int) -> None:
    """Write how it ended, if not as it should, and the documents that were read."""
    if answer.outcome in _ENDED:
        out.write(f"({_ENDED[answer.outcome]})\n")
    for event in answer.events:
        if event.kind in _EVENTS:
            out.write(f"({_EVENTS[event.kind].format(number=event.number)})\n")
    for place, citation in enumerate(answer.citations, start=1):
        parts = [citation.id] if citation.title in ("", citation.id) else [citation.title, citation.id]
        parts += [] if citation.namespace in ("", "default") else [citation.namespace]
        parts += ["not scored" if citation.score is None else f"score {citation.score:.3f}"]
        parts += [f"first {citation.tokens} tokens"] if citation.cut else []
        out.write(shorten(f"[{place}] {' · '.join(parts)}", width) + "\n")
        out.write("    " + shorten(citation.text, width - 4) + "\n")


def write_explanation(explanation: Explanation, out: TextIO, width: int) -> None:
    """Write the documents that the router finds: a line each, and one for every router layer."""
    if not explanation.documents:
        out.write("No document can be read for it.\n")
    for place, document in enumerate(explanation.documents, start=1):
        name = document.title or document.id
        out.write(shorten(f"{place}. {name} · {document.id} · score {document.score:.3f}", width) + "\n")
        for match in document.layers:
            head = f"    layer {match.layer}: {match.score:.3f}, rank {match.rank}, by {clean(match.token.strip())!r}: "
            out.write(head + shorten(match.passage, max(20, width - len(head))) + "\n")


def as_json(answer: Answer, explanation: Explanation | None = None) -> dict[str, Any]:
    """An answer, and why its documents were found, as plain values."""
    value = {
        "question": answer.question,
        "answer": answer.text,
        "outcome": answer.outcome,
        "score": answer.score,
        "citations": [_citation(c) for c in answer.citations],
        "rounds": [_round(r) for r in answer.rounds],
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "seconds": {"waited": answer.waited, "first_token": answer.first_token, "total": answer.seconds},
    }
    if explanation is not None:
        value["explanation"] = [dataclasses.asdict(d) for d in explanation.documents]
    return _plain(value)


def _citation(citation: Citation) -> dict[str, Any]:
    return dataclasses.asdict(citation)


def _round(one: Round) -> dict[str, Any]:
    """A round; `documents` holds, for every router layer, (number, score) of the best."""
    best = [
        [[n, s] for n, s in zip(numbers, scores, strict=True) if n >= 0]
        for numbers, scores in zip(one.documents.tolist(), one.scores.tolist(), strict=True)
    ]
    events = [{"kind": event.kind, "number": event.number} for event in one.events]
    names = ("written", "computed", "why", "tokens")
    return {"documents": best, "events": events} | {name: getattr(one, name) for name in names}


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's; what JSON has no word for as null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
