"""Why the router finds what it finds, told with the documents' own words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from msa_jax.data.records import Document
from msa_jax.data.samples import Renderer
from msa_jax.errors import ConfigError, QuestionError
from msa_jax.inference.corpus import Corpus, View
from msa_jax.inference.explain import explain_question
from msa_jax.model import MSATransformer
from msa_jax.routing import need_scores

_TORN = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class LayerMatch:
    """Why one router layer scores a document as it does.

    Attributes:
      layer: of the model, from 0.
      score: of the document in this layer, that of its best chunk. rank: from 1 among all that may be seen.
      chunk: the best one, from 0 within the document. passage: its text, without the frame if there is text in it.
      token: of the question, the one that scores it best, with its neighbours where it is part of a character.
    """

    layer: int
    score: float
    rank: int
    chunk: int
    passage: str
    token: str


@dataclasses.dataclass(frozen=True)
class Explained:
    """A document that the router finds; `score` is the mean over router layers, `layers` one for each of them."""

    number: int
    id: str
    title: str
    namespace: str
    text: str
    score: float
    layers: tuple[LayerMatch, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The documents that the router finds best for a question in the first round, best first."""

    question: str
    documents: tuple[Explained, ...]


def explanation_of(
    model: MSATransformer, renderer: Renderer, corpus: Corpus, view: View, question: str, *, documents: int
) -> Explanation:
    """Explain a question to a corpus.

    Raises:
      QuestionError: it is empty, there is no bank, or the retriever scores only some documents.
    """
    try:
        need_scores(model.config.retriever, "explain")
    except ConfigError as e:
        raise QuestionError(str(e)) from None
    if not question.strip():
        raise QuestionError("the question is empty.")
    if corpus.bank is None:
        raise QuestionError("there is no bank to find documents in.")
    tokens, roles = renderer.prompt(question)
    one = lambda x: np.asarray(x)[None]  # noqa: E731
    visible = np.asarray(corpus.visibility.of(one(view.allowed), one(np.int32(view.seen))))[0]
    found = explain_question(
        model, renderer.prefix, tokens, roles, corpus.bank, visible=visible, documents=documents
    )
    return Explanation(question, tuple(filter(None, (_told(model, renderer, corpus, view, tokens, f) for f in found))))


def _told(model, renderer, corpus, view, tokens, found) -> Explained | None:
    number = int(corpus.numbers(np.array([found.index]))[0])
    original = corpus.find(number, view)
    if original is None:
        return None
    document: Document = original.document
    texts = texts_of_chunks(renderer, document, number, model.config.chunk_size)
    layers = tuple(
        LayerMatch(
            layer=layer,
            score=float(found.scores[i]),
            rank=int(found.ranks[i]),
            chunk=int(found.chunks[i]),
            passage=texts[found.chunks[i]],
            token=text_of_token(renderer, tokens, int(found.tokens[i])),
        )
        for i, layer in enumerate(model.config.router_layers)
    )
    return Explained(
        number=number,
        id=document.id,
        title=document.title,
        namespace=original.namespace,
        text=document.text,
        score=float(np.mean(found.scores)),
        layers=layers,
    )


def texts_of_chunks(renderer: Renderer, document: Document, number: int, chunk_size: int) -> list[str]:
    """The text of every chunk of a document: no part of the frame, unless there is nothing else in it."""
    rendered, first = renderer.render_document(document, number), renderer.text_start(number)
    last = first + len(renderer.body(document))
    decode, texts = renderer.tokenizer.decode, []
    for begin in range(0, len(rendered), chunk_size):
        end = begin + chunk_size
        if end <= first or begin >= last:
            texts.append(decode(rendered[begin:end]))
            continue
        # Characters that are partly in another chunk are left out; if there are no others, one of them is whole here.
        exact, wider = (
            decode(rendered[max(begin - more, first) : min(end + more, last)]).strip(_TORN + " ") for more in (0, 3)
        )
        texts.append(exact or wider)
    return texts


def text_of_token(renderer: Renderer, tokens: Sequence[int], at: int) -> str:
    """The text of one of `tokens`, with its neighbours where it is only part of a character."""
    for reach in range(4):
        text = renderer.tokenizer.decode(tokens[max(0, at - reach) : at + reach + 1])
        if not (text.startswith(_TORN) and text.endswith(_TORN)):
            break
    return text.strip(_TORN + " ")
