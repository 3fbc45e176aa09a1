"""The thread of a session: it runs the engine, and does between two steps what others ask of it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from msa_jax.inference.engine import Engine

_LOG = logging.getLogger(__name__)
# Seconds between two steps that are given to somebody who reads the bank before it changes.
_PATIENCE = 0.02


class Worker:
    """Runs an engine in a thread. Methods may be called from any other.

    Attributes:
      reading: while it is held the bank stays as it is; questions go on.
    """

    def __init__(
        self,
        engine: Engine,
        follow: Callable[[bool], bool] | None,
        scope: Callable[[], contextlib.AbstractContextManager],
    ):
        """Start.

        Args:
          follow: brings the engine's corpus up to date; told whether no question is in progress, it says whether it
            could. None for a corpus that does not change.
          scope: what the thread computes within.
        """
        self.reading = threading.Lock()
        self._engine, self._bring_up_to_date, self._scope = engine, follow, scope
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], concurrent.futures.Future]] = queue.SimpleQueue()
        self._following: list[concurrent.futures.Future] = []
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)
        self._thread.start()

    def need_open(self) -> None:
        """Raises RuntimeError when it was closed."""
        if self._closed.is_set():
            raise RuntimeError("the session is closed.")

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    def do(self, task: Callable[[], Any]) -> Any:
        """What `task` returns or raises, called in the thread between two steps."""
        self.need_open()
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._tasks.put((task, future))
        self._wake.set()
        if self._closed.is_set():
            self._drop_tasks()
        return future.result()

    def follow(self) -> None:
        """Return when the corpus is up to date. Raises what bringing it there raises."""
        done: concurrent.futures.Future = concurrent.futures.Future()
        self.do(lambda: self._following.append(done))
        done.result()

    def close(self) -> bool:
        """Give up all questions and end the thread; False if that was done before."""
        if self._closed.is_set():
            return False
        self._closed.set()
        self._wake.set()
        self._thread.join()
        return True

    def _run(self) -> None:
        with self._scope():
            while not self._closed.is_set():
                self._run_tasks()
                self._follow()
                try:
                    worked = self._engine.step()
                except Exception:
                    # Every question it concerns has ended with the error; others may come.
                    _LOG.exception("a step of the session failed")
                    continue
                if not worked and not self._following and self._tasks.empty():
                    self._wake.wait()
                    self._wake.clear()
        self._engine.close()
        self._drop_tasks()

    def _run_tasks(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                task, future = self._tasks.get_nowait()
                try:
                    future.set_result(task())
                except BaseException as error:
                    future.set_exception(error)

    def _drop_tasks(self) -> None:
        closed = RuntimeError("the session is closed.")
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()[1].set_exception(closed)
        while self._following:
            self._following.pop().set_exception(closed)

    def _follow(self) -> None:
        """Bring the corpus up to date, if somebody waits for that."""
        if not self._following:
            self._engine.admits = True
            return
        if not self.reading.acquire(timeout=_PATIENCE):
            return
        idle = not self._engine.running
        try:
            if self._bring_up_to_date is not None and not self._bring_up_to_date(idle):
                self._engine.admits = False  # until those in progress are through
                return
            if idle:
                self._engine.renew()
        except Exception as error:
            while self._following:
                self._following.pop().set_exception(error)
        finally:
            self.reading.release()
        while self._following:
            self._following.pop().set_result(None)
        self._engine.admits = True
