"""Why a question reads the documents it reads: the passages that match, and what in the question they match."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from msa_jax.data.records import Document
from msa_jax.data.samples import Renderer
from msa_jax.inference.explain import Found

_TORN = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class LayerMatch:
    """How one router layer finds a document.

    Attributes:
      layer: of the model, from 0.
      score: of the document in that layer, the best of its chunks'.
      rank: of the document among all that the question may see; 1 is the best.
      chunk: its best chunk, from 0; passage: the text of that.
      token: the text of the question's token that finds it.
    """

    layer: int
    score: float
    rank: int
    chunk: int
    passage: str
    token: str


@dataclasses.dataclass(frozen=True)
class Explained:
    """A document that the router finds: `score` is the mean over router layers, `layers` one for each of them."""

    number: int
    id: str
    title: str
    namespace: str
    text: str
    score: float
    layers: tuple[LayerMatch, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The documents that the router finds best for a question, best first; a few, or all if there are fewer."""

    question: str
    documents: tuple[Explained, ...]


class Text(Protocol):
    """What is shown of a document: a `BankDocument` or `Document`."""

    id: str
    title: str
    text: str


class Source(NamedTuple):
    """What document it is that was found: `document` has `id`, `title` and `text`."""

    number: int
    document: Text
    namespace: str


def explanation(
    question: str,
    found: Sequence[Found],
    sources: Sequence[Source],
    *,
    renderer: Renderer,
    tokens: Sequence[int],
    router_layers: Sequence[int],
    chunk_size: int,
) -> Explanation:
    """What `explain_question` found, with the texts.

    Args:
      question: as asked.
      found: the documents; sources: which they are, one each.
      renderer: with which documents were rendered to be encoded.
      tokens: of the framed question, as given to `explain_question`.
      router_layers, chunk_size: of the model's config.
    """
    explained = []
    for one, source in zip(found, sources, strict=True):
        passages = _passages(renderer, source, chunk_size)
        layers = tuple(
            LayerMatch(layer, float(score), int(rank), int(chunk), passages[chunk], _word(renderer, tokens, int(at)))
            for layer, score, rank, chunk, at in zip(router_layers, *one[1:], strict=True)
        )
        number, document, namespace = source
        shown = (number, document.id, document.title, namespace, document.text)
        explained.append(Explained(*shown, score=float(np.mean(one.scores)), layers=layers))
    return Explanation(question, tuple(explained))


def _passages(renderer: Renderer, source: Source, chunk_size: int) -> list[str]:
    """The text of every chunk: no part of the frame, unless there is nothing else in it."""
    document = Document(source.document.id, source.document.title, source.document.text)
    rendered, first = renderer.render_document(document, source.number), renderer.text_start(source.number)
    last = first + len(renderer.body(document))
    decode, passages = renderer.tokenizer.decode, []
    for begin in range(0, len(rendered), chunk_size):
        end = begin + chunk_size
        if end <= first or begin >= last:
            passages.append(decode(rendered[begin:end]))
            continue
        # Characters that are partly in another chunk are left out; if there are no others, one of them is whole here.
        exact, wider = (
            decode(rendered[max(begin - more, first) : min(end + more, last)]).strip(_TORN + " ") for more in (0, 3)
        )
        passages.append(exact or wider)
    return passages


def _word(renderer: Renderer, tokens: Sequence[int], at: int) -> str:
    """The text of a token, with its neighbours where it is only part of a character."""
    for reach in range(4):
        text = renderer.tokenizer.decode(tokens[max(0, at - reach) : at + reach + 1])
        if not (text.startswith(_TORN) and text.endswith(_TORN)):
            break
    return text.strip(_TORN + " ")
