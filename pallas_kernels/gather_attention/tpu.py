"""TPU form of `gather_attention`: chunks are copied to VMEM from where they lie, one block ahead of the work."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tpu_chip
from pallas_kernels.gather_attention import config, tpu_backward, tpu_forward, tpu_owners
from pallas_kernels.gather_attention.reference import Gradients, Operands, shifted_delta

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
    if blocks_of(operands, operands.bank_k.shape[0]) is None:
        return f"no block of queries {q.shape} fits in VMEM."
    return None


def blocks_of(operands: Operands, max_length: int) -> config.Blocks | None:
    _, t, h, d = operands.q.shape
    kv = operands.k.shape[2]
    sizes = operands.q.dtype.itemsize, operands.bank_k.dtype.itemsize
    return config.choose(t, operands.k.shape[1], h // kv, kv, d, max_length, *sizes, tpu_chip.vmem_budget())


def forward(operands: Operands, *, max_length: int):
    """Out [B, T, H, D] and lse [B, T, H]. See `reference.forward`."""
    return tpu_forward.forward(operands, blocks=blocks_of(operands, max_length), cores=_cores())


def backward(operands: Operands, out, lse, grad_out, grad_lse, *, max_length: int) -> Gradients:
    """See `reference.backward`."""
    q, k, starts = operands.q, operands.k, operands.starts
    blocks = blocks_of(operands, max_length)
    delta = shifted_delta(out, grad_out, grad_lse)
    grad_q, grad_bias = tpu_backward.backward(operands, lse, delta, grad_out, blocks=blocks, cores=_cores())
    if operands.bias is None or not starts.size:
        grad_bias = None if operands.bias is None else jnp.zeros_like(operands.bias)
    owners = functools.partial(tpu_owners.backward, lse=lse, delta=delta, grad_out=grad_out, blocks=blocks)
    b, s = k.shape[:2]
    own = jnp.zeros_like(k), jnp.zeros_like(operands.v)
    if s:
        flat = (x.reshape(b * s, *x.shape[2:]) for x in (k, operands.v))
        each = jnp.arange(b, dtype=jnp.int32)[:, None] * s
        mask = operands.mask.reshape(-1)
        grads = owners(q, *flat, each, jnp.full_like(each, s), None, mask, causal=True)
        own = tuple(x.reshape(k.shape) for x in grads)
    bank = None, None
    if jnp.issubdtype(operands.bank_k.dtype, jnp.floating):
        bank = jnp.zeros_like(operands.bank_k), jnp.zeros_like(operands.bank_v)
        if starts.size and operands.bank_k.shape[0]:
            ranges = starts, operands.lengths, operands.bias, None
            bank = owners(q, operands.bank_k, operands.bank_v, *ranges, causal=False)
    return Gradients(grad_q, *own, *bank, None if grad_bias is None else grad_bias.astype(operands.bias.dtype))


def _cores() -> int:
    """Cores of the chip that share the steps of one kernel."""
    return 1 if dispatch.device()[0] != "tpu" else pltpu.get_tpu_info().num_cores
