"""Several processes as one: how they start, agree, exchange small results, and end together.

Every process runs the same command. Arrays live on a mesh over the devices of all of them; the functions here are for
what is not arrays. With one process they do nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from msa_jax.errors import ConfigError


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = 30,
    join_seconds: int = 300,
) -> None:
    """Join the other processes, before JAX is used for anything; without arguments JAX finds them by itself.

    Raises:
      ConfigError: the others cannot be reached.
    """
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            initialization_timeout=join_seconds, heartbeat_timeout_seconds=heartbeat_seconds,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"could not join the other processes ({str(error).splitlines()[0]}): is process 0 running, and can "
            f"{coordinator or 'it'} be reached from here?"
        ) from error


def several() -> bool:
    """Whether this process was started as one of several."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this process writes what is written once: logs, plots, settings."""
    return jax.process_index() == 0


def end(message: str) -> NoReturn:
    """Exit status 1 with a message. One of several processes does not wait for the others, who might wait for it."""
    if not several():
        raise SystemExit(message) from None
    sys.stdout.flush()
    print(f"process {jax.process_index()} of {jax.process_count()}: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def agree(settings: Mapping[str, Any]) -> None:
    """Make sure that every process has the same settings, given in the same named parts.

    Raises:
      ConfigError: names the parts and the processes that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    texts = (json.dumps(value, sort_keys=True, default=str) for value in settings.values())
    mine = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32) for text in texts])
    every = np.asarray(multihost_utils.process_allgather(mine))
    differs = (every != every[0]).any(axis=2)
    if differs.any():
        parts = [name for name, bad in zip(settings, differs.any(axis=0), strict=True) if bad]
        others = np.flatnonzero(differs.any(axis=1)).tolist()
        raise ConfigError(
            f"settings of {', '.join(parts)} differ between process 0 and {', '.join(map(str, others))}: start every "
            "process with the same config file and flags."
        )


def wait_for_all(what: str) -> None:
    """Return when every process is here. `what` is the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gather(value: Any) -> list[Any]:
    """What every process has, by process: values that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(data.size)))
    padded = np.pad(data, (0, sizes.max() - data.size))
    every = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag, so that a loop can save before it ends.

    Of several processes any may get the signal, and all stop after the same step.
    """

    def __init__(self):
        self._received: str | None = None
        self._shared = jax.process_count() > 1

    def __enter__(self):
        # JAX itself listens for SIGTERM, and tells the other processes.
        numbers = (signal.SIGINT,) if self._shared else (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number, _):
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._received = signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def received(self, step: int) -> str | None:
        """Name of the signal after which to stop, once for every step."""
        if self._shared and multihost_utils.reached_preemption_sync_point(step):
            self._received = signal.SIGTERM.name
        return self._received
