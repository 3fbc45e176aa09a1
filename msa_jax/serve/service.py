"""What a server has and shares between its requests."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

from msa_jax.inference.session import Session
from msa_jax.inference.settings import AskConfig
from msa_jax.serve.errors import ApiError
from msa_jax.serve.keys import Access, Keys
from msa_jax.serve.limits import Gate, Limits
from msa_jax.serve.metrics import Metrics

log = logging.getLogger(__name__)
T = TypeVar("T")
_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)


class Service:
    """The session, who may use it, and what is under way. All but the threads' work is in the event loop's thread.

    Attributes:
      session: None until it is loaded and warm: all is compiled that questions need.
      draining: told to stop: nothing new is taken.
      model: the name that clients give.
      bank: its place, which no response tells.
      defaults: how a question is asked as far as its request does not say.
      writable: documents may be changed.
      keys: None: everybody may do everything.
      local: only clients who call this machine "localhost" or by a loopback address are served.
      metrics, limits: of the server.
      requests, questions, writes: gates.
      cancels: what cancels each question under way.
    """

    def __init__(
        self,
        *,
        model: str,
        bank: str = "",
        defaults: AskConfig,
        limits: Limits,
        keys: Keys | None,
        local: bool = False,
        writable: bool = False,
    ):
        self.session: Session | None = None
        self.draining = False
        self.model, self.bank, self.defaults, self.limits = model, bank, defaults, limits
        self.keys, self.local, self.writable = keys, local, writable
        self.metrics = Metrics(lambda: self.session and self.session.stats())
        self.requests = Gate(limits.requests, "requests")
        self.questions = Gate(limits.waiting, "questions")
        self.writes = Gate(limits.writes, "changes of documents")
        self.cancels: set[Callable[[], None]] = set()
        self._tasks: set[asyncio.Task] = set()
        self._given_up = asyncio.Event()
        # Changes take long, and reading a listing may: questions must not stand behind them.
        self._threads = {
            name: concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix=f"serve-{name}")
            for name, count in (("ask", 4), ("read", 4), ("write", 1))
        }

    def start(self, session: Session, slots: int) -> None:
        """Take questions from now on, `slots` of which run together. From any thread."""
        self.questions.limit = slots + self.limits.waiting
        self.session = session

    def asked(self) -> Session:
        """The session.

        Raises:
          ApiError: 503 while it is loaded.
        """
        if self.session is None:
            raise ApiError(
                503, "The model is still being loaded: try again shortly.", code="loading", headers={"retry-after": "5"}
            )
        return self.session

    def access(self, authorization: str | None) -> Access:
        """What a request with that Authorization header may do. Raises ApiError 401."""
        return Access() if self.keys is None else self.keys.access(authorization)

    async def chosen(self, named: tuple[str, ...] | None, access: Access, param: str) -> tuple[str, ...] | None:
        """See `Access.chosen`."""
        session = self.asked()
        known = () if access.namespaces is None else await self.thread("ask", lambda: tuple(session.namespaces))
        return access.chosen(named, known, param)

    def require_host(self, host: str | None) -> None:
        """Without keys, a page of the web could have its visitor's browser read from a server on his own machine, by
        a name that leads there. Raises ApiError 403 for such a name."""
        if self.local and not _LOOPBACK.fullmatch(host or "localhost"):
            raise ApiError(403, "This server serves this machine alone: call it localhost, or start it with --open.")

    async def thread(self, kind: str, function: Callable[[], T]) -> T:
        """The function's result, computed in a thread for "ask", "read" or "write"."""
        return await asyncio.get_running_loop().run_in_executor(self._threads[kind], function)

    async def change(self, function: Callable[[], T]) -> T:
        """The result of a change of documents, which run one after another.

        Raises:
          ApiError: 503 when the server ends before it.
        """
        change = asyncio.ensure_future(self.thread("write", function))
        given_up = asyncio.create_task(self._given_up.wait())
        try:
            await asyncio.wait((change, given_up), return_when=asyncio.FIRST_COMPLETED)
        finally:
            given_up.cancel()
        if not change.done():
            raise ApiError(503, "The server is stopping; what the change has committed stays.", code="stopping")
        return change.result()

    def later(self, function: Callable[[], Any]) -> None:
        """Call it in a thread, whatever comes of it."""

        def guarded():
            try:
                function()
            except Exception:
                log.exception("a question cannot be cancelled")

        self._threads["ask"].submit(guarded)

    def keep(self, task: asyncio.Task) -> None:
        """Hold a task until it ends: the event loop itself does not."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def give_up(self) -> None:
        """Cancel what is being answered, and wait for no change of documents."""
        self._given_up.set()
        for cancel in list(self.cancels):
            self.later(cancel)
