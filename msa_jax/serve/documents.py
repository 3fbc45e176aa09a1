"""Routes that add, change, delete and list documents, within the namespaces of the request's key."""

from __future__ import annotations

import base64
import functools
import heapq
import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, JsonValue, TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse

from msa_jax.bank.ingest import Report
from msa_jax.bank.table import DEFAULT_NAMESPACE, BankDocument
from msa_jax.errors import BankError
from msa_jax.serve.completion import Figure, Told
from msa_jax.serve.errors import ApiError, shown
from msa_jax.serve.fields import Fields, Filled, read
from msa_jax.serve.keys import Access
from msa_jax.serve.limits import read_json
from msa_jax.serve.service import Service

_METADATA_LEVELS = 32


def _not_deep(metadata: Any) -> Any:
    level, levels = [metadata], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        if (levels := levels + 1) > _METADATA_LEVELS:
            raise ValueError(f"must be nested at most {_METADATA_LEVELS} deep")
    return metadata


def _place(cursor: Any) -> Any:
    """The namespace and id at which another page ended."""
    try:
        return TypeAdapter(tuple[str, str]).validate_json(base64.b64decode(cursor, altchars=b"-_", validate=True))
    except (ValueError, TypeError):
        raise ValueError("must be the `next` of another page") from None


class DocumentBody(Fields):
    id: Filled
    text: Filled
    title: str | None = None
    namespace: str | None = None
    metadata: Annotated[dict[str, JsonValue], BeforeValidator(_not_deep)] | None = None


class DocumentsBody(Fields):
    documents: Annotated[list, Field(min_length=1)]


class OneQuery(Fields):
    namespace: str | None = None


class ListQuery(OneQuery, strict=False):
    prefix: str = ""
    limit: Annotated[int, Field(ge=1)] | None = None
    after: Annotated[tuple[str, str] | None, BeforeValidator(_place)] = None


class ToldDocument(Told):
    object: str = "document"
    id: str
    text: str
    title: str
    namespace: str
    metadata: dict[str, Any]


class ToldReport(Told):
    object: str = "report"
    added: int
    unchanged: int
    encoded_tokens: int
    seconds: Figure


def namespace_of(named: str | None, access: Access, param: str) -> str:
    """The namespace a request is about: the one it names, else its key's if that has one alone, else "default".

    Raises:
      ApiError: 403.
    """
    if named is None:
        only = access.namespaces is not None and len(access.namespaces) == 1
        named = access.namespaces[0] if only else DEFAULT_NAMESPACE
    return access.require(named, param)


def read_documents(body: Any, access: Access) -> list[BankDocument]:
    """The documents of a body: one object, or `{"documents": [...]}`.

    Raises:
      ApiError: 400 for what is no document, 403 for one of another namespace.
    """
    if not isinstance(body, dict) or "documents" not in body:
        return [_document(body, "", access)]
    items = read(DocumentsBody, body).documents
    return [_document(item, f"documents[{i}]", access) for i, item in enumerate(items)]


def _document(item: Any, where: str, access: Access) -> BankDocument:
    given = read(DocumentBody, item, where)
    namespace = namespace_of(given.namespace, access, f"{where}.namespace".lstrip("."))
    return BankDocument(given.id, given.text, given.title or "", namespace, given.metadata or {})


class Documents:
    """The routes."""

    def __init__(self, service: Service):
        self._service = service

    async def _change(self, function: Callable[[], Any]) -> Any:
        try:
            return await self._service.change(function)
        except BankError as e:
            raise ApiError(400, str(e).removeprefix(f"{self._service.bank}: "), code="bank_refused") from None

    def _require_write(self, access: Access) -> None:
        access.require_write()
        if not self._service.writable:
            raise ApiError(403, "This server does not change its bank: start it with --writable.", code="read_only")

    async def add(self, request: Request) -> JSONResponse:
        """POST: new documents. PUT: new texts, titles or metadata of documents that are there."""
        service, access = self._service, request.state.access
        session = service.asked()
        self._require_write(access)
        with service.writes.hold():
            documents = read_documents(await read_json(request, service.limits), access)
            change = session.add if request.method == "POST" else session.update
            report: Report = await self._change(functools.partial(change, documents))
        return JSONResponse(ToldReport.of(report))

    async def delete(self, request: Request) -> JSONResponse:
        service, access = self._service, request.state.access
        session = service.asked()
        self._require_write(access)
        identity, namespace = self._named(request)

        def delete():
            self._get(session, identity, namespace)
            session.delete([identity], namespace=namespace)

        with service.writes.hold():
            await self._change(delete)
        return JSONResponse({"object": "document.deleted", "id": identity, "namespace": namespace, "deleted": True})

    async def get(self, request: Request) -> JSONResponse:
        session = self._service.asked()
        identity, namespace = self._named(request)
        document = await self._service.thread("read", lambda: self._get(session, identity, namespace))
        return JSONResponse(ToldDocument.of(document))

    def _named(self, request: Request) -> tuple[str, str]:
        query = read(OneQuery, dict(request.query_params))
        namespace = namespace_of(query.namespace, request.state.access, "namespace")
        return request.path_params["id"], namespace

    @staticmethod
    def _get(session: Any, identity: str, namespace: str) -> BankDocument:
        try:
            return session.get(identity, namespace)
        except KeyError:
            raise ApiError(
                404, f"There is no document {shown(identity)} in namespace {shown(namespace)}.", code="not_found"
            ) from None

    async def list(self, request: Request) -> JSONResponse:
        service, access = self._service, request.state.access
        session = service.asked()
        query = read(ListQuery, dict(request.query_params))
        most = service.limits.page
        limit = min(100, most) if query.limit is None else query.limit
        if limit > most:
            raise ApiError(400, f"limit must be from 1 to {most}, got {limit}.", param="limit")
        if query.namespace is None:
            spaces = (None,) if access.namespaces is None else access.namespaces
        else:
            spaces = (access.require(query.namespace, "namespace"),)

        def page() -> list[tuple[str, str]]:
            found = (item for space in spaces for item in session.list(namespace=space, prefix=query.prefix))
            # In order, so that a page goes on where the last one ended, whatever came and went since.
            return heapq.nsmallest(limit + 1, (item for item in found if query.after is None or item > query.after))

        found = await service.thread("read", page)
        shown_now = found[:limit]
        return JSONResponse(
            {
                "object": "list",
                "data": [{"object": "document", "id": i, "namespace": space} for space, i in shown_now],
                "has_more": len(found) > limit,
                "next": _cursor(*shown_now[-1]) if len(found) > limit else None,
            }
        )


def _cursor(namespace: str, identity: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([namespace, identity]).encode()).decode()
