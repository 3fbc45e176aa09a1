"""What the TPU kernels need to know of the chip they are compiled for."""

from __future__ import annotations

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

SUBLANES = 8
LANES = 128
# The compiler keeps some of VMEM to itself.
_VMEM_SHARE = 0.75
# Interpreted kernels take the sizes of the smallest chip we compile for.
_INTERPRETED_VMEM = 64 << 20


def sublanes(size: int) -> int:
    """`size` as the chip stores it in the last dimension but one of 32-bit values: a multiple of 8."""
    return -(-size // SUBLANES) * SUBLANES


def lanes(size: int) -> int:
    """`size` as the chip stores it in the last dimension: a multiple of 128."""
    return -(-size // LANES) * LANES


def vmem_budget() -> int:
    """Bytes of vector memory (VMEM) that one kernel may use on the chip in scope."""
    platform, _ = dispatch.device()
    capacity = _INTERPRETED_VMEM if platform != "tpu" else pltpu.get_tpu_info().vmem_capacity_bytes
    return int(capacity * _VMEM_SHARE)
