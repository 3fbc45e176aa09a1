"""TPU form of `gather_attention`: chunks are copied to VMEM from where they lie, one block ahead of the work."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tpu_chip
from pallas_kernels.gather_attention import config, tpu_forward
from pallas_kernels.gather_attention.reference import Operands

_FLOATS = (jnp.float32, jnp.bfloat16)
# Bytes of scalar memory (SMEM) that the tables and biases may take.
_SMEM_BYTES = 512 << 10


def unsupported(*, operands: Operands) -> str | None:
    """Why a case cannot run, or None. See `reference.unsupported`."""
    q, bank = operands.q, operands.bank_k
    if q.dtype not in _FLOATS or operands.k.dtype != q.dtype or bank.dtype not in (*_FLOATS, jnp.int8):
        return (
            "q, k, v must be all float32 or all bfloat16 and the bank one of them or int8, "
            f"got {q.dtype}, {operands.k.dtype}, {bank.dtype}."
        )
    if 0 in q.shape:
        return f"there is no query: q {q.shape}."
    scalars = 4 * (q.shape[0] + 3 * operands.starts.size + (0 if operands.bias is None else operands.bias.size))
    if scalars > _SMEM_BYTES:
        return f"ranges and biases of {operands.starts.shape} documents take {scalars} of {_SMEM_BYTES} bytes of SMEM."
    if _blocks(operands, operands.bank_k.shape[0]) is None:
        return f"no block of queries {q.shape} fits in VMEM."
    return None


def _blocks(operands: Operands, max_length: int) -> config.Blocks | None:
    _, t, h, d = operands.q.shape
    kv = operands.k.shape[2]
    sizes = operands.q.dtype.itemsize, operands.bank_k.dtype.itemsize
    return config.choose(t, h // kv, kv, d, max_length, *sizes, tpu_chip.vmem_budget())


def forward(operands: Operands, *, max_length: int):
    """Out [B, T, H, D] and lse [B, T, H]. See `reference.forward`."""
    return tpu_forward.forward(operands, blocks=_blocks(operands, max_length), cores=_cores())


def _cores() -> int:
    """Cores of the chip that share the steps of one kernel."""
    return 1 if dispatch.device()[0] != "tpu" else pltpu.get_tpu_info().num_cores
