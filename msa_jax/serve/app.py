"""The routes, and what is the same for all of them: who may, how much at once, errors, the log, the metrics."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from msa_jax.serve.chat import read_chat
from msa_jax.serve.completion import Completion
from msa_jax.serve.documents import Documents
from msa_jax.serve.errors import ApiError, ClientGone
from msa_jax.serve.explain import explain
from msa_jax.serve.limits import TooLarge, read_json
from msa_jax.serve.metrics import CONTENT_TYPE
from msa_jax.serve.questions import ask
from msa_jax.serve.service import Service

log = logging.getLogger(__name__)

# Served always, to anyone; neither counted against the requests at once nor logged.
PROBES = ("/healthz", "/readyz")
# For the log and the metrics: the client went away before the response.
_CLIENT_GONE = 499


class Application:
    """The server as an ASGI application."""

    def __init__(self, service: Service):
        self._service = service
        documents = Documents(service)
        self._router = Router(
            [
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/explain", self._explain, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{model:path}", self._model, methods=["GET"]),
                Route("/v1/documents", documents.list, methods=["GET"]),
                Route("/v1/documents", documents.add, methods=["POST", "PUT"]),
                Route("/v1/documents/{id:path}", documents.get, methods=["GET"]),
                Route("/v1/documents/{id:path}", documents.delete, methods=["DELETE"]),
                Route("/healthz", self._health, methods=["GET"]),
                Route("/readyz", self._ready, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served: run it with lifespan off and without websockets")
        begin, name, status = time.monotonic(), secrets.token_hex(8), None

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        # Starlette leaves errors to whoever is named here.
        scope["app"] = self
        metrics = self._service.metrics
        metrics.in_flight.inc()
        try:
            await self._serve(scope, receive, numbered, name)
        except ClientGone:
            status = _CLIENT_GONE
        finally:
            metrics.in_flight.dec()
            seconds = time.monotonic() - begin
            route = getattr(scope.get("route"), "path", "none")
            metrics.request(route, scope["method"], status or _CLIENT_GONE, seconds)
            who = getattr(scope.get("state", {}).get("access"), "name", "")
            level = logging.DEBUG if route in PROBES else logging.INFO
            log.log(level, "%s %s %s %s %.3f s %s", name, scope["method"], route, status or _CLIENT_GONE, seconds, who)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, name: str) -> None:
        """Serve a request, or send why not."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._admit(Request(scope), receive, noted)
            return
        except TooLarge as e:
            await e.send(scope, receive, send)
            return
        except ApiError as e:
            error = e
        except HTTPException as e:
            what = "This method is not served here" if e.status_code == 405 else "There is nothing at this address"
            error = ApiError(e.status_code, f"{what}: see the documentation of the routes.", headers=e.headers)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("request %s failed", name)
            error = ApiError(500, f"The server failed; its log tells more of request {name}.", code="internal_error")
        if begun:
            raise ClientGone  # too late to say so; the connection is closed in the middle
        await error.response()(scope, receive, send)

    async def _admit(self, request: Request, receive: Receive, send: Send) -> None:
        """Routes a request that may be served."""
        service, scope = self._service, request.scope
        service.require_host(request.headers.get("host"))
        if request.url.path in PROBES:
            await self._router(scope, receive, send)
            return
        request.state.access = service.access(request.headers.get("authorization"))
        if service.draining and request.url.path != "/metrics":
            raise ApiError(
                503, "The server is stopping: ask again elsewhere or later.", code="stopping",
                headers={"connection": "close"},
            )  # fmt: skip
        with service.requests.hold():
            await self._router(scope, receive, send)

    async def _chat(self, request: Request):
        service, access = self._service, request.state.access
        service.asked()
        body = await read_json(request, service.limits)
        chat = read_chat(body, model=service.model, defaults=service.defaults, timeout=service.limits.timeout)
        namespaces = await service.chosen(chat.namespaces, access, "msa.namespaces")
        return await ask(service, request, chat, namespaces, Completion(chat, access, service.model))

    async def _explain(self, request: Request) -> Response:
        return JSONResponse(await explain(self._service, request))

    def _about_model(self) -> dict[str, object]:
        return {"id": self._service.model, "object": "model", "created": 0, "owned_by": "msa-jax"}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about_model()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self._service.model:
            raise ApiError(404, "There is no such model: GET /v1/models tells what there is.", code="model_not_found")
        return JSONResponse(self._about_model())

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        service = self._service
        status = "draining" if service.draining else "ready" if service.session is not None else "loading"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def _metrics(self, request: Request) -> Response:
        request.state.access.require_all()
        return Response(await self._service.thread("ask", self._service.metrics.text), media_type=CONTENT_TYPE)
