"""Which implementation an operation runs: chosen by name it never falls back."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import typing
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp

log = logging.getLogger(__name__)

Implementation = Literal["xla", "tpu", "gpu"]
IMPLEMENTATIONS: tuple[str, ...] = typing.get_args(Implementation)


def device() -> tuple[str, str]:
    """Platform ("cpu", "tpu", "gpu") and kind of the device that a program traced here is meant for.

    A mesh in scope decides (`jax.set_mesh`; so programs compile for chips that this host lacks), else JAX's
    default device.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return {"cuda": "gpu", "rocm": "gpu"}.get(abstract.platform, abstract.platform), abstract.device_kind
    default = jax.config.jax_default_device
    if default is None:
        default = jax.devices()[0]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return default.platform, default.device_kind


def interpreted() -> bool:
    """Whether Pallas kernels are interpreted in this scope (`force_tpu_interpret_mode` and its GPU twin)."""
    from jax.experimental import pallas as pl

    # JAX has no word for it, but a call that is traced here tells how it would run. It takes milliseconds.
    (call,) = jax.make_jaxpr(pl.pallas_call(_write_zero, out_shape=jax.ShapeDtypeStruct((), jnp.float32)))().eqns
    return bool(call.params["interpret"])


def _write_zero(out):
    out[...] = jnp.zeros((), jnp.float32)


def interpreting(name: str | None):
    """A scope in which kernels of implementation `name` run on any machine: interpreted where it lacks the device.

    For checking results, as it is slow. "xla" and None need no such scope. For "gpu" on few cores set NPROC=16 in the
    environment before JAX starts: an interpreted warpgroup may wait for another one and holds a thread meanwhile.
    """
    if name not in ("tpu", "gpu") or device()[0] == name or interpreted():
        return contextlib.nullcontext()
    if name == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.force_tpu_interpret_mode()
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.force_gpu_interpret_mode()


def choose(op: str, implementation: str | None, **case) -> ModuleType:
    """The module that runs `op`: its `reference`, `tpu` or `gpu`.

    Args:
      op: name of the operation, a package of `pallas_kernels`.
      implementation: "xla", "tpu" or "gpu"; None is the kernel of the platform where it can run the case,
        else "xla", with the reason in the log, once.
      **case: what the module's `unsupported` takes: arrays, or anything with their shape and dtype.

    Raises:
      ValueError: a name nobody knows.
      NotImplementedError: the named implementation cannot run the case, or not on this platform.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}.")
    platform, kind = device()
    name = platform if implementation is None else implementation
    if name not in ("tpu", "gpu"):
        return module(op, "xla")
    if name != platform and not interpreted():
        raise NotImplementedError(
            f"{op}: the {name!r} kernel does not run on {platform} ({kind}); take implementation=None, or compile "
            f"for a {name} under jax.set_mesh of its devices."
        )
    found = module(op, name)
    reason = _partitioned() or found.unsupported(**case)
    if reason is None:
        return found
    if implementation is not None:
        raise NotImplementedError(f"{op}: the {name!r} kernel cannot run this: {reason}")
    _log_once(f"{op}: the {name!r} kernel cannot run this, 'xla' does: {reason}")
    return module(op, "xla")


def _partitioned() -> str | None:
    """Why no kernel can run in the mesh in scope, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names):
        return None
    axes = ", ".join(name for name in mesh.axis_names if name not in mesh.manual_axes)
    return f"XLA cannot partition a kernel over the mesh axes {axes}: call it within jax.shard_map over all axes."


def module(op: str, name: str) -> ModuleType:
    """The module of `op` that is of implementation `name`."""
    # Imported on demand: a CPU program never loads Pallas.
    return importlib.import_module(f"pallas_kernels.{op}.{'reference' if name == 'xla' else name}")


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)
