"""What the server takes at most, of a request and of many at once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from msa_jax.errors import require
from msa_jax.serve.errors import ApiError, ClientGone

# After a refusal of a body that is still coming, this much more of it and this many seconds are waited for: a client
# that is cut off while it writes may never read the refusal.
_LINGER_BYTES, _LINGER_SECONDS = 1 << 24, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused, and when.

    Attributes:
      body: bytes of a request's body; 413 above.
      body_seconds: until a body must have come; 408 then.
      requests: being served at once; 429 above.
      waiting: questions beyond those that the engine runs together; 429 above.
      writes: changes of documents, one of which runs while the others wait; 429 above.
      timeout: seconds for a question, from its submission. A request may ask for less.
      grace: seconds that running questions have once the server is told to stop.
      page: documents of one listing.
    """

    body: int = 4 << 20
    body_seconds: float = 30.0
    requests: int = 256
    waiting: int = 64
    writes: int = 8
    timeout: float = 120.0
    grace: float = 20.0
    page: int = 1000

    def __post_init__(self):
        for name, least in dict(body=1, requests=1, waiting=0, writes=1, page=1).items():
            value = getattr(self, name)
            require(isinstance(value, int) and value >= least, f"Limits: {name} must be at least {least}, got {value}.")
        for name in ("body_seconds", "timeout"):
            require(0 < getattr(self, name) < 1e9, f"Limits: {name} must be above 0, got {getattr(self, name)}.")
        require(0 <= self.grace < 1e9, f"Limits: grace must be at least 0, got {self.grace}.")


class Gate:
    """Counts what is under way, and refuses with 429 what is too much. For the event loop's thread alone."""

    def __init__(self, limit: int, what: str):
        """`what` is under way, in the plural."""
        self.limit, self.what, self.taken = limit, what, 0

    def enter(self) -> None:
        if self.taken >= self.limit:
            raise ApiError(
                429, f"The server has {self.taken} {self.what} under way and takes no more: try again shortly.",
                code="overloaded", headers={"retry-after": "1"},
            )  # fmt: skip
        self.taken += 1

    def leave(self) -> None:
        self.taken -= 1

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()


class TooLarge(ApiError):
    """A body over the limit. The connection is closed after the response, but not before the client had time to
    read it."""

    def __init__(self, limit: int):
        super().__init__(
            413, f"The body is longer than {limit:,} bytes, the most this server takes: send less at once.",
            code="body_too_large", headers={"connection": "close"},
        )  # fmt: skip

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The response, whose end is held back while the client goes on sending."""

        async def all_but_end(message):
            await send(message | {"more_body": True} if message["type"] == "http.response.body" else message)

        await JSONResponse(self.to_dict(), self.status, self.headers)(scope, receive, all_but_end)
        if not any(name == b"expect" for name, _ in scope["headers"]):  # such a client sends when told to
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_SECONDS):
                    seen, more = 0, True
                    while more and seen < _LINGER_BYTES:
                        message = await receive()
                        more = message.get("more_body", False)
                        seen += len(message.get("body", b""))
        await send({"type": "http.response.body", "body": b""})


async def read_json(request: Request, limits: Limits) -> Any:
    """The body of a request, parsed.

    Raises:
      ApiError: 413 too long, whether it says so or not; 408 too slow; 415 not called JSON; 400 not JSON.
      ClientGone: the client went away meanwhile.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps web pages from posting here: browsers send no such request to another site unasked.
        raise ApiError(415, "The body must be JSON: send it with the header 'Content-Type: application/json'.")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > limits.body:
        raise TooLarge(limits.body)
    raw, more = bytearray(), True
    try:
        async with asyncio.timeout(limits.body_seconds):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                raw += message.get("body", b"")
                more = message.get("more_body", False)
                if len(raw) > limits.body:
                    raise TooLarge(limits.body)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not come within {limits.body_seconds:g} s.", headers={"connection": "close"}
        ) from None
    return parse_json(bytes(raw))


def parse_json(raw: bytes) -> Any:
    """Parse UTF-8 JSON whose strings are text and whose numbers are written as JSON has them.

    Raises:
      ApiError: 400.
    """
    try:
        return from_json(raw, allow_inf_nan=False)
    except ValueError as e:
        raise ApiError(400, f"The body is not valid JSON: {e}.", code="invalid_json") from None
