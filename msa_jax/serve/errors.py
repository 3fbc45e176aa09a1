"""Refusals: a status and one sentence, in the shape that OpenAI's API gives errors."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused.

    Attributes:
      status: of HTTP.
      message: one sentence: what is wrong, where, and how to mend it.
      param: the field it is about, such as `messages[0].content`.
      code: a word that programs can tell refusals apart by.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The body of the response."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.to_dict(), self.status, self.headers)


class ClientGone(Exception):
    """The client closed the connection: nobody waits for a response."""


_SHORT = reprlib.Repr(maxlevel=3, maxlist=4, maxdict=4, maxstring=60, maxlong=30, maxother=60)


def shown(value: Any) -> str:
    """A value of the request's as a message quotes it: cut when it is long or deep."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
