"""Timing, power-law fits and records that the benchmarks share."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np


def median_seconds(forms: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median wall time of each form, in seconds, to the end of its computation.

    Forms are called in turn, so that what else the machine does strikes all of them alike; a first call of each,
    with compilation in it, does not count.
    """
    times = {name: [] for name in forms}
    for call in forms.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in forms.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_per_call(
    call: Callable, inputs: Sequence[tuple], *, rounds: int = 9, enough_seconds: float = 0.05
) -> float:
    """Median over rounds of the time of one of many calls in a row, in seconds; for accelerators.

    Args:
      call: a compiled function that returns before the device is done.
      inputs: its argument tuples, taken in rotation: give several where one would stay in the device's cache.
      rounds: timed rounds after one that does not count.
      enough_seconds: a round makes as many calls as take about this long, so that the time it takes the host to
        start one hides behind the device's work on the one before.
    """
    jax.block_until_ready([call(*arguments) for arguments in inputs])
    begin = time.perf_counter()
    jax.block_until_ready([call(*arguments) for arguments in inputs])
    once = (time.perf_counter() - begin) / len(inputs)
    calls = max(len(inputs), min(500, round(enough_seconds / max(once, 1e-7))))
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for i in range(calls):
            result = call(*inputs[i % len(inputs)])
        jax.block_until_ready(result)
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times[1:])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power p of the best fit `value = constant * size^p`, by least squares of the logarithms."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float)), 1)[0])


def environment() -> dict:
    """What the figures were taken on: device and versions."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    }


def _short(value):
    if isinstance(value, dict):
        return {name: _short(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write_json(path: str | pathlib.Path, record: dict) -> None:
    """Write the record as JSON, a line an entry, whole or not at all; floats to five digits; folders are made."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    lines = [f"{json.dumps(name)}: {json.dumps(_short(value))}" for name, value in record.items()]
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)
