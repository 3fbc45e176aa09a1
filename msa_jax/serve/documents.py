"""Routes that add, change, delete and list documents, within the namespaces of the request's key."""

from __future__ import annotations

import base64
import dataclasses
import functools
import heapq
import json
from collections.abc import Callable, Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from msa_jax.bank.ingest import Report
from msa_jax.bank.table import DEFAULT_NAMESPACE, BankDocument
from msa_jax.errors import BankError
from msa_jax.serve.errors import ApiError, shown
from msa_jax.serve.fields import Fields
from msa_jax.serve.keys import Access
from msa_jax.serve.limits import read_json
from msa_jax.serve.service import Service

# Python's own limit depends on where it is met; this is far below.
_METADATA_LEVELS = 32
_FIELDS = tuple(field.name for field in dataclasses.fields(BankDocument))


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
    fields = Fields(body)
    items = fields.items("documents")
    fields.done(("documents",))
    if not items:
        raise ApiError(400, "documents must hold at least one document.", param="documents")
    return [_document(item, f"documents[{i}]", access) for i, item in enumerate(items)]


def _document(item: Any, where: str, access: Access) -> BankDocument:
    fields = Fields(item, where)
    values = {name: fields.string(name) for name in ("id", "text", "title")}
    for name in ("id", "text"):
        if not values[name]:
            raise fields.refusal(name, "a string that is not empty", values[name])
    namespace = namespace_of(fields.string("namespace"), access, fields.at("namespace"))
    metadata = fields.mapping("metadata") or {}
    if _depth(metadata) > _METADATA_LEVELS:
        raise fields.refusal("metadata", f"nested at most {_METADATA_LEVELS} deep", metadata)
    fields.done(_FIELDS)
    return BankDocument(
        id=values["id"], text=values["text"], title=values["title"] or "", namespace=namespace, metadata=metadata
    )


def _depth(value: Any) -> int:
    levels, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        levels += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return levels


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
        return JSONResponse(
            {
                "object": "report",
                "added": report.added,
                "unchanged": report.unchanged,
                "encoded_tokens": report.encoded_tokens,
                "seconds": round(report.seconds, 3),
            }
        )

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
        return JSONResponse(document_dict(document))

    def _named(self, request: Request) -> tuple[str, str]:
        query = _query(request, ("namespace",))
        namespace = namespace_of(query.get("namespace"), request.state.access, "namespace")
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
        query = _query(request, ("prefix", "namespace", "limit", "after"))
        limit, after = _limit(query.get("limit"), service.limits.page), _after(query.get("after"))
        prefix, named = query.get("prefix", ""), query.get("namespace")
        if named is not None:
            named = access.require(named, "namespace")
        spaces = access.namespaces if named is None else (named,)

        def page() -> list[tuple[str, str]]:
            chosen = (None,) if spaces is None else spaces
            found = (item for space in chosen for item in session.list(namespace=space, prefix=prefix))
            return _first(found, after, limit + 1)

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


def document_dict(document: BankDocument) -> dict[str, Any]:
    return (
        {"object": "document"}
        | {name: getattr(document, name) for name in _FIELDS}
        | {"metadata": dict(document.metadata)}
    )


def _first(found: Iterable[tuple[str, str]], after: tuple[str, str] | None, count: int) -> list[tuple[str, str]]:
    """In order of namespace and id, so that a page goes on where the last one ended, whatever came and went since."""
    return heapq.nsmallest(count, (item for item in found if after is None or item > after))


def _query(request: Request, known: tuple[str, ...]) -> dict[str, str]:
    for name in request.query_params:
        if name not in known:
            there_are = ", ".join(known)
            raise ApiError(400, f"There is no query parameter {shown(name)} here; there are {there_are}.", param=name)
    return dict(request.query_params)


def _limit(text: str | None, most: int) -> int:
    if text is None:
        return min(100, most)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise ApiError(400, f"limit must be an integer from 1 to {most}, got {shown(text)}.", param="limit")
    return int(text)


def _cursor(namespace: str, identity: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([namespace, identity]).encode()).decode()


def _after(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    try:
        namespace, identity = json.loads(base64.b64decode(text.encode(), altchars=b"-_", validate=True))
        if isinstance(namespace, str) and isinstance(identity, str):
            return namespace, identity
    except (ValueError, TypeError, RecursionError):
        pass
    raise ApiError(400, f"after must be the `next` of another page, got {shown(text)}.", param="after")
