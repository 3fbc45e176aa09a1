"""A question under way: handed to the session, followed while it is answered, cancelled when nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from msa_jax.errors import QuestionError
from msa_jax.inference.answer import Answer, StreamEvent
from msa_jax.inference.request import Request as Asked
from msa_jax.inference.settings import AskConfig
from msa_jax.serve.chat import ChatRequest
from msa_jax.serve.completion import Completion
from msa_jax.serve.errors import ApiError, ClientGone
from msa_jax.serve.service import Service

log = logging.getLogger(__name__)

# Between two looks at whether the session still knows the question, in case it ended without a word.
_LOOK_SECONDS = 1.0
# A stream without news sends a comment this often: proxies keep it open, and a lost client is found out.
_ALIVE_SECONDS = 15.0
# What the session may be late with an outcome that it owes, and a client with taking a piece of its stream.
_LATE_SECONDS, _SEND_SECONDS = 15.0, 60.0


class Question:
    """A question that was submitted; use as an asynchronous context manager, which cancels what has not ended."""

    def __init__(self, service: Service, config: AskConfig):
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[StreamEvent | Exception] = asyncio.Queue()
        self._deadline = self._loop.time() + (config.timeout or float("inf")) + _LATE_SECONDS
        self._ended = asyncio.Event()
        self._pending: Asked | None = None

    @classmethod
    async def submit(
        cls, service: Service, text: str, namespaces: tuple[str, ...] | None, config: AskConfig
    ) -> Question:
        """Hand a question to the session.

        Raises:
          ApiError: 429 when too many are under way, 400 when the session refuses it.
        """
        session = service.asked()
        question = cls(service, config)
        service.questions.enter()
        submission = asyncio.ensure_future(
            service.thread(
                "ask",
                lambda: session.submit(text, namespaces=namespaces, config=config, listener=question._listen),
            )
        )
        try:
            question._pending = await asyncio.shield(submission)
        except asyncio.CancelledError:
            # Here the server ends; what the thread still submits is not waited for.
            submission.add_done_callback(lambda done: done.cancelled() or done.exception() or done.result().cancel())
            service.questions.leave()
            raise
        except QuestionError as e:
            service.questions.leave()
            raise ApiError(400, str(e), param="messages", code="question_refused") from None
        except BaseException:
            service.questions.leave()
            raise
        service.cancels.add(question._pending.cancel)
        return question

    def _listen(self, event: StreamEvent) -> None:
        """In the session's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: StreamEvent) -> None:
        if self._ended.is_set():
            return
        if event.answer is not None:
            self._ended.set()
            self._service.metrics.answer(event.answer)
        self._events.put_nowait(event if event.error is None else self._failure(event.error))

    async def next(self, seconds: float) -> StreamEvent | None:
        """The next event; None when there is none within so many seconds.

        Raises:
          ApiError: 500 when the session lost the question, 504 when it owes the outcome for too long.
          ClientGone: nobody waits any more, if `watch` is on.
        """
        until = self._loop.time() + seconds
        while (left := until - self._loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(self._events.get(), min(left, _LOOK_SECONDS))
                if isinstance(event, Exception):
                    raise event
                return event
            if self._pending.done() and self._events.empty():
                return StreamEvent(answer=await self._result())
            if self._loop.time() > self._deadline:
                raise ApiError(504, "The question was given up: the engine does not answer.", code="timed_out")
        return None

    async def _result(self) -> Answer:
        """Of a question that ended and whose last event did not come."""
        try:
            answer = await self._service.thread("ask", lambda: self._pending.result(timeout=1.0))
        except Exception as e:
            raise self._failure(e) from None
        self._take(StreamEvent(answer=answer))
        return answer

    def _failure(self, error: BaseException) -> ApiError:
        if not self._ended.is_set():
            log.error("a question failed", exc_info=error)
            self._service.metrics.failed()
        self._ended.set()
        return ApiError(500, "The question failed; the server's log says why.", code="failed")

    @contextlib.asynccontextmanager
    async def watch(self, receive: Receive):
        """Makes `next` raise ClientGone once the client has closed the connection."""

        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            self._events.put_nowait(ClientGone())

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()

    async def __aenter__(self) -> Question:
        return self

    async def __aexit__(self, *_) -> None:
        if self._ended.is_set():
            self._leave()
            return
        self._service.later(self._pending.cancel)
        # It takes its place in the engine until the session says that it has ended.
        self._service.keep(asyncio.create_task(self._until_ended()))

    async def _until_ended(self) -> None:
        until = self._loop.time() + _LATE_SECONDS
        while not self._ended.is_set() and not self._pending.done() and self._loop.time() < until:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), 0.1)
        self._leave()

    def _leave(self) -> None:
        self._service.questions.leave()
        self._service.cancels.discard(self._pending.cancel)


def _refusal_of(answer: Answer) -> ApiError | None:
    """Why there is no answer, if there is none."""
    if answer.outcome == "cancelled":
        return ApiError(503, "The server is stopping: ask again elsewhere or later.", code="stopping")
    if answer.outcome == "timed_out" and not answer.text:
        # Official clients would ask again at once.
        return ApiError(
            504, "The question took longer than it may, and nothing was written: allow more time (msa.timeout, "
            "--timeout), or ask when the server has less to do.", code="timed_out", headers={"x-should-retry": "false"},
        )  # fmt: skip
    return None


async def respond(question: Question, completion: Completion, request: Request) -> JSONResponse:
    """The whole answer.

    Raises:
      ApiError: 503 cancelled as the server stops, 504 timed out without a word, 500.
      ClientGone: nobody waits for it.
    """
    async with question, question.watch(request.receive):
        while True:
            event = await question.next(_LOOK_SECONDS)
            if event is not None and event.answer is not None:
                if (refusal := _refusal_of(event.answer)) is not None:
                    raise refusal
                return JSONResponse(completion.whole(event.answer))


class EventStream:
    """The answer as server-sent events while it is written: a response of Starlette's kind."""

    def __init__(self, question: Question, completion: Completion):
        self._question, self._completion = question, completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(text: str, more: bool = True) -> None:
            try:
                async with asyncio.timeout(_SEND_SECONDS):
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
            except TimeoutError:
                raise ClientGone from None  # it has stopped reading

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        async with self._question as question, question.watch(receive):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await put(self._completion.first())
            try:
                while (end := await self._next(question, put)) is None:
                    pass
            except ApiError as e:
                end = _error_lines(e)
            await put(end, more=False)

    async def _next(self, question: Question, put: Any) -> str | None:
        """Sends the next event; returns the lines that end the stream if it was the last."""
        event = await question.next(_ALIVE_SECONDS)
        if event is None:
            await put(": waiting\n\n")
            return None
        if event.citation is not None:
            await put(self._completion.citation(event.citation))
        if event.text:
            await put(self._completion.text(event.text))
        if event.answer is None:
            return None
        refusal = _refusal_of(event.answer)
        return self._completion.last(event.answer) if refusal is None else _error_lines(refusal)


def _error_lines(error: ApiError) -> str:
    return f"data: {json.dumps(error.to_dict(), ensure_ascii=False)}\n\ndata: [DONE]\n\n"


async def ask(service: Service, request: Request, chat: ChatRequest, namespaces, completion: Completion):
    """Submit, and the response."""
    question = await Question.submit(service, chat.question, namespaces, chat.config)
    return EventStream(question, completion) if chat.stream else await respond(question, completion, request)
