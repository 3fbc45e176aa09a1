"""The route that tells which documents the router finds for a question, and by what."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request

from msa_jax.errors import QuestionError
from msa_jax.serve.completion import Figure, Told
from msa_jax.serve.errors import ApiError
from msa_jax.serve.fields import Fields, read
from msa_jax.serve.limits import read_json
from msa_jax.serve.service import Service


class ToldLayer(Told):
    layer: int
    score: Figure
    rank: int
    chunk: int
    passage: str
    token: str


class ToldDocument(Told):
    id: str
    title: str
    namespace: str
    text: str
    score: Figure
    layers: list[ToldLayer]


class ExplainBody(Fields):
    question: str
    namespaces: list[str] | None = None
    # Nobody reads more.
    documents: Annotated[int, Field(ge=1, le=100)] | None = None


async def explain(service: Service, request: Request) -> dict[str, Any]:
    """Body: `question`, and if you like `namespaces` and `documents`, how many (5).

    Raises:
      ApiError: 400 for a bad body or question, 403, 429.
    """
    session, access = service.asked(), request.state.access
    body = read(ExplainBody, await read_json(request, service.limits))
    named = None if body.namespaces is None else tuple(body.namespaces)
    namespaces = await service.chosen(named, access, "namespaces")
    with service.questions.hold():
        try:
            found = await service.thread(
                "ask", lambda: session.explain(body.question, namespaces=namespaces, documents=body.documents or 5)
            )
        except QuestionError as e:
            raise ApiError(400, str(e), param="question", code="question_refused") from None
    documents = [ToldDocument.of(one) for one in found.documents]
    for layer, text in ((layer, one["text"]) for one in documents for layer in one["layers"]):
        layer["passage"] = own_words(layer["passage"], text)
    return {"object": "explanation", "question": body.question, "documents": documents}


def own_words(passage: str, text: str) -> str:
    """As much of a passage as is the document's own text: what frames it holds the number."""
    passage = passage.strip("\N{REPLACEMENT CHARACTER} ")
    if passage not in text:
        passage = passage[max(0, passage.find(text[:12].strip())) :]
    while passage not in text:
        passage = passage[:-1]
    return passage
