"""The server from its start to its end: loading while it listens, signals, a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable

import uvicorn

from msa_jax.errors import ConfigError
from msa_jax.serve.app import Application
from msa_jax.serve.keys import Keys
from msa_jax.serve.service import Service

log = logging.getLogger(__name__)

# After the grace, for cancelled questions to be told so.
_CANCEL_SECONDS = 10.0


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, not yet listening.

    Raises:
      ConfigError: taken, or no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError) as e:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({e}): choose another one.") from e
    return bound


class _Server(uvicorn.Server):
    """Leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def make_server(service: Service) -> uvicorn.Server:
    """The server, for `serve` to run."""
    config = uvicorn.Config(
        Application(service), http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, timeout_graceful_shutdown=int(service.limits.grace + _CANCEL_SECONDS) + 1,
    )  # fmt: skip
    return _Server(config)


async def serve(service: Service, bound: socket.socket, load: Callable[[], None], keys_file: str | None = None) -> None:
    """Serve until a signal, loading meanwhile.

    Args:
      bound: from `bind`.
      load: makes and warms the session; called in a thread. What it raises ends the server.
      keys_file: read again on SIGHUP.
    """
    server, loop, stopping = make_server(service), asyncio.get_running_loop(), asyncio.Event()

    def stop():
        if stopping.is_set():
            service.give_up()
            return
        log.info("stopping: what runs has %g s", service.limits.grace)
        end()

    def end():
        service.draining = server.should_exit = True
        stopping.set()

    def reload():
        try:
            service.keys = Keys.load(keys_file)
            log.info("keys read anew")
        except ConfigError as e:
            log.error("the keys stay as they were: %s", e)

    async def cancel_late():
        await stopping.wait()
        await asyncio.sleep(service.limits.grace)
        while True:  # also one that was just being submitted
            service.give_up()
            await asyncio.sleep(0.5)

    failure: list[BaseException] = []

    def loading():
        try:
            load()
        except BaseException as e:
            failure.append(e)
            loop.call_soon_threadsafe(end)

    for name in ("SIGTERM", "SIGINT"):
        loop.add_signal_handler(getattr(signal, name), stop)
    if keys_file is not None:
        loop.add_signal_handler(signal.SIGHUP, reload)
    late = asyncio.create_task(cancel_late())
    # A daemon: loading cannot be interrupted, and ending should not wait for it.
    threading.Thread(target=loading, name="load", daemon=True).start()
    host, port = bound.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    try:
        await server.serve(sockets=[bound])
    finally:
        late.cancel()
    if failure:
        raise failure[0]
