"""The implementations that the contract suites run, and how each runs without its hardware."""

import contextlib

import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

IMPLEMENTATIONS = ("xla", "tpu", "gpu")


def quick(cases, *named) -> list:
    """Parameters: the named cases run by default, the rest of the matrix is slow."""
    return [pytest.param(case, marks=[] if case in named else pytest.mark.slow) for case in cases]


def matrix(cases, *, xla=None, tpu=(), gpu=()) -> list:
    """Parameters (case, implementation). Interpreting takes seconds, so a kernel runs the cases named for it, and the
    plain form all or those named; the rest of the matrix is slow."""
    quick = {"xla": cases if xla is None else xla, "tpu": tpu, "gpu": gpu}
    return [
        pytest.param(case, name, marks=[] if case in quick[name] else pytest.mark.slow)
        for name in IMPLEMENTATIONS
        for case in cases
    ]


@contextlib.contextmanager
def running(name: str):
    """A scope in which `implementation=name` runs on this machine: interpreted, if it is a kernel.

    Races between threads and copies, and reads out of bounds, raise; memory nobody has written holds NaN.
    """
    if name == "xla":
        yield
        return
    if name == "tpu":
        params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
        with pltpu.force_tpu_interpret_mode(params):
            yield
        return
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    with plgpu.force_gpu_interpret_mode(params):
        yield


def skip_unless_supported(op: str, name: str, **case) -> None:
    """Skip a case that the kernel declares it cannot run, once it has raised when asked for it by name."""
    with running(name):
        reason = dispatch.module(op, name).unsupported(**case)
        if reason is None:
            return
        with pytest.raises(NotImplementedError, match=r"cannot run this"):
            dispatch.choose(op, name, **case)
    pytest.skip(f"{name}: {reason}")


def at_most_twice(got, want, plain) -> None:
    """The largest error is at most twice that of the plain form, and a hair for where that is exact."""
    got, plain, want = (np.asarray(x, np.float64) for x in (got, plain, want))
    if want.size:
        bound = 2 * np.abs(plain - want).max() + 1e-6 * max(1.0, np.abs(want).max())
        assert np.abs(got - want).max() <= bound
