"""The route that tells which documents the router finds for a question, and by what."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from msa_jax.errors import QuestionError
from msa_jax.inference.explanation import Explained
from msa_jax.serve.completion import finite
from msa_jax.serve.errors import ApiError
from msa_jax.serve.fields import Fields
from msa_jax.serve.limits import read_json
from msa_jax.serve.service import Service

# More than anyone reads.
_MOST_DOCUMENTS = 100


async def explain(service: Service, request: Request) -> dict[str, Any]:
    """Body: `question`, and if you like `namespaces` and `documents`, how many (5).

    Raises:
      ApiError: 400 for a bad body or question, 403, 429.
    """
    session, access = service.asked(), request.state.access
    fields = Fields(await read_json(request, service.limits))
    question, named = fields.string("question"), fields.strings("namespaces")
    documents = fields.integer("documents", least=1, most=_MOST_DOCUMENTS) or 5
    fields.done(("question", "namespaces", "documents"))
    if question is None:
        raise fields.refusal("question", "a string", None)
    namespaces = await service.chosen(named, access, "namespaces")
    with service.questions.hold():
        try:
            found = await service.thread(
                "ask", lambda: session.explain(question, namespaces=namespaces, documents=documents)
            )
        except QuestionError as e:
            raise ApiError(400, str(e), param="question", code="question_refused") from None
    return {"object": "explanation", "question": question, "documents": [_document(one) for one in found.documents]}


def _document(one: Explained) -> dict[str, Any]:
    """Without its number, which tells how many documents other namespaces have."""
    layers = [
        {"layer": at.layer, "score": finite(at.score), "rank": at.rank, "chunk": at.chunk,
         "passage": own_words(at.passage, one.text), "token": at.token}
        for at in one.layers
    ]  # fmt: skip
    return {
        "id": one.id, "title": one.title, "namespace": one.namespace, "text": one.text, "score": finite(one.score),
        "layers": layers,
    }  # fmt: skip


def own_words(passage: str, text: str) -> str:
    """As much of a passage as is the document's own text: what frames it holds the number."""
    passage = passage.strip("\N{REPLACEMENT CHARACTER} ")
    if passage not in text:
        passage = passage[max(0, passage.find(text[:12].strip())) :]
    while passage not in text:
        passage = passage[:-1]
    return passage
