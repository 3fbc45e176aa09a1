"""Why the router finds what it finds, told with the documents' own words."""

from __future__ import annotations

import dataclasses

import numpy as np

from msa_jax.data.records import Document
from msa_jax.data.samples import Renderer
from msa_jax.inference.explain import explain_question
from msa_jax.inference.library import Library, QuestionError, View
from msa_jax.model import MSATransformer


@dataclasses.dataclass(frozen=True)
class Passage:
    """Why one router layer scores a document as it does.

    Attributes:
      layer: of the model, from 0.
      score: of the document in this layer, that of its best chunk. rank: from 1 among all that may be seen.
      text: of the best chunk, as the model encodes it.
      token: of the question, the one that scores it best.
    """

    layer: int
    score: float
    rank: int
    text: str
    token: str


@dataclasses.dataclass(frozen=True)
class Explained:
    """A document that the router finds; `score` is the mean over router layers, `passages` one of each."""

    number: int
    id: str
    title: str
    namespace: str
    text: str
    score: float
    passages: tuple[Passage, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The documents that the router finds best for a question in the first round, best first."""

    question: str
    documents: tuple[Explained, ...]


def explanation_of(
    model: MSATransformer, renderer: Renderer, library: Library, view: View, question: str, *, documents: int
) -> Explanation:
    """Explain a question to a library.

    Raises:
      QuestionError: it is empty, or there is no bank.
    """
    if not question.strip():
        raise QuestionError("the question is empty.")
    if library.bank is None:
        raise QuestionError("there is no bank to find documents in.")
    tokens, roles = renderer.prompt(question)
    one = lambda x: np.asarray(x)[None]  # noqa: E731
    visible = np.asarray(library.visibility.of(one(view.allowed), one(np.int32(view.seen))))[0]
    found = explain_question(
        model, renderer.prefix, tokens, roles, library.bank, visible=visible, documents=documents
    )
    return Explanation(question, tuple(filter(None, (_told(model, renderer, library, view, tokens, f) for f in found))))


def _told(model, renderer, library, view, tokens, found) -> Explained | None:
    number = int(library.numbers(np.array([found.index]))[0])
    original = library.find(number, view)
    if original is None:
        return None
    document: Document = original.document
    decode, size = renderer.tokenizer.decode, model.config.chunk_size
    rendered = renderer.render_document(document, number)
    passages = tuple(
        Passage(
            layer=layer,
            score=float(found.scores[i]),
            rank=int(found.ranks[i]),
            text=decode(rendered[found.chunks[i] * size : (found.chunks[i] + 1) * size]),
            token=decode([tokens[found.tokens[i]]]),
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
        passages=passages,
    )
