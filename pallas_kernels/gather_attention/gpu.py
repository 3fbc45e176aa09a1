"""`gather_attention` on NVIDIA Hopper: what it can run, the arrangement of its operands, and its two directions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.gather_attention import gpu_backward, gpu_config, gpu_forward, gpu_owners, gpu_tiles
from pallas_kernels.gather_attention.gpu_config import ALIGNMENT, COLUMNS
from pallas_kernels.gather_attention.reference import MASKED, Gradients, Operands, shifted_delta

# A larger bank is refused rather than copied where its chunks are no multiple of 8.
COPIED_BANK_BYTES = 64 * 2**20
HOPPER = ("H100", "H200", "H800", "H20")  # in the names of devices, "GH200" among them


def _capability() -> str | None:
    """Why the device in scope cannot run the kernels, or None; interpreted, or lowered from a CPU, every one can."""
    platform, kind = dispatch.device()
    if dispatch.interpreted() or platform != "gpu":
        return None
    here = [d.compute_capability for d in jax.devices() if d.device_kind == kind and hasattr(d, "compute_capability")]
    if here[0] == "9.0" if here else any(name in kind for name in HOPPER):
        return None
    return f"it is written for Hopper (compute capability 9.0), not for {kind}."


def unsupported(*, operands: Operands) -> str | None:
    """Why a case cannot run here, in one sentence, or None."""
    d, num_chunks = operands.q.shape[3], operands.bank_k.shape[0]
    dtypes = {str(jnp.dtype(x.dtype)) for x in (operands.q, operands.k, operands.v)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        return f"q, k and v must be bfloat16 or float32, all three the same; they are {sorted(dtypes)}."
    if str(jnp.dtype(operands.bank_k.dtype)) not in ("bfloat16", "float32", "int8"):
        return f"the bank must be bfloat16, float32 or int8; it is {operands.bank_k.dtype}."
    if d % 16 or d > 128:
        return f"the head dim must be a multiple of 16 up to 128, as TMA and wgmma take it; it is {d}."
    size = operands.bank_k.size * jnp.dtype(operands.bank_k.dtype).itemsize
    if num_chunks % ALIGNMENT and size > COPIED_BANK_BYTES:
        return (
            f"TMA needs a multiple of {ALIGNMENT} chunks, and padding this bank would copy {size >> 20} MiB a call; "
            f"pad its capacity once: it holds {num_chunks} chunks."
        )
    if not gpu_config.fits(d, operands.q.dtype, operands.bank_k.dtype):
        return f"its tiles do not fit into shared memory: head dim {d} in {operands.q.dtype}."
    documents, own = operands.starts.shape[1], operands.k.shape[1]
    if math.prod(gpu_tiles.plan_shape(documents, own)) > gpu_config.MOST_PLANNED:
        return (
            f"{documents} documents and {own} own tokens are more than it plans for: documents / 16 + own / 4096 < 16."
        )
    return _capability()


def _case(operands: Operands, max_length: int, **extra):
    b, t, h, d = operands.q.shape
    s, kv = operands.k.shape[1], operands.k.shape[2]
    documents = operands.starts.shape[1] if operands.bank_k.shape[0] else 0
    tiles = documents * -(-(max_length + ALIGNMENT - 1) // COLUMNS) + -(-s // COLUMNS)
    sizes = gpu_config.choose(
        rows=t * (h // kv),
        others=b * kv,
        tiles=tiles,
        head_dim=d,
        dtype=operands.q.dtype,
        bank_dtype=operands.bank_k.dtype,
        **extra,
    )
    return gpu_tiles.Case(
        sizes=sizes,
        tokens=t,
        own=s,
        group=h // kv,
        head_dim=d,
        documents=documents,
        scales=0 if operands.bank_k_scale is None else operands.bank_k_scale.shape[-1],
        dtype=operands.q.dtype,
        bank_dtype=operands.bank_k.dtype,
        biased=operands.bias is not None and documents > 0,
        clean_keys="row_operands" in extra,
    )


def _to_rows(x, kv, rows):
    """[B, T, H, ...] -> [B, K, rows, ...], a row being a (token, head of the group) pair; zeros at the end."""
    b, t, h = x.shape[:3]
    x = jnp.moveaxis(x.reshape(b, t, kv, h // kv, *x.shape[3:]), 2, 1)
    x = x.reshape(b, kv, t * (h // kv), *x.shape[4:])
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), *((0, 0),) * (x.ndim - 3)))


def _from_rows(x, t, h):
    """[..., B, K, rows, *rest] -> [B, T, H, *rest], for x [B, K, rows, *rest]."""
    b, kv = x.shape[:2]
    x = x[:, :, : t * (h // kv)].reshape(b, kv, t, h // kv, *x.shape[3:])
    return jnp.moveaxis(x, 1, 2).reshape(b, t, h, *x.shape[4:])


def _pieces(x):
    """[p, ...] bfloat16: the numbers that stand for one of x in a product."""
    if x.dtype == jnp.bfloat16:
        return x[None]
    parts = []
    for _ in range(gpu_config.pieces(x.dtype)):
        # Not a cast there and back, which the compiler may take for nothing.
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return jnp.stack(parts).astype(jnp.bfloat16)


def _whole(x, axis: int):
    """`x` padded to whole TMA tiles; nothing is copied where it has them."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % ALIGNMENT)
    return jnp.pad(x, padding) if padding[axis][1] else x


def _gmem(case, operands: Operands):
    b, t, h, _ = operands.q.shape
    kv = operands.k.shape[2]
    rows = -(-t * case.group // case.sizes.rows) * case.sizes.rows
    gmem = dict(plan=gpu_tiles.plan(operands), q=_pieces(_to_rows(operands.q, kv, rows)))
    if case.own:
        gmem |= dict(k=_pieces(_whole(operands.k, 1)), v=_pieces(_whole(operands.v, 1)))
        gmem["mask"] = jnp.pad(operands.mask.astype(jnp.float32), ((0, 0), (0, -case.own % COLUMNS)))
    if case.documents:
        gmem |= dict(bank_k=_whole(operands.bank_k, 0), bank_v=_whole(operands.bank_v, 0))
        if case.int8:
            scales = (operands.bank_k_scale, operands.bank_v_scale)
            gmem["scale_k"], gmem["scale_v"] = (scale.reshape(-1) for scale in scales)
        if case.biased:
            bias = jnp.broadcast_to(operands.bias[:, None], (b, t, *operands.bias.shape[1:]))
            bias = jnp.moveaxis(bias, 2, 3).astype(jnp.float32)  # [B, T, H, k]
            gmem["bias"] = jnp.moveaxis(_to_rows(bias, kv, rows), 3, 2)
    return gmem


def forward(operands: Operands, *, max_length: int) -> tuple[jax.Array, jax.Array]:
    """Out [B, T, H, D] in q's dtype and lse [B, T, H] float32; see `reference.forward`."""
    q = operands.q
    b, t, h, d = q.shape
    case = _case(operands, max_length)
    if not (case.documents or case.own):
        return jnp.zeros_like(q), jnp.full(q.shape[:3], MASKED, jnp.float32)
    out, lse = gpu_forward.launch(case, _gmem(case, operands))
    out, lse = (out[0], lse[0]) if case.sizes.splits == 1 else _merge(out, lse)
    return _from_rows(out, t, h).astype(q.dtype), _from_rows(lse, t, h)


def _merge(out, lse):
    """The softmax over all splits from those over each, [splits, B, K, R, D] and [splits, B, K, R]."""
    top = jnp.maximum(jnp.max(lse, axis=0, keepdims=True), MASKED / 2)
    weights = jnp.exp(lse - top)
    total = jnp.sum(weights, axis=0)
    safe_total = jnp.where(total > 0, total, 1.0)
    out = jnp.sum(out * weights[..., None], axis=0) / safe_total[..., None]
    return out, jnp.where(total > 0, top[0] + jnp.log(safe_total), MASKED)


def backward(operands: Operands, out, lse, grad_out, grad_lse, *, max_length: int) -> Gradients:
    """Gradients of the float operands; see `reference.backward`. Two runs agree bit by bit."""
    q, k, bank = operands.q, operands.k, operands.bank_k
    b, t, h, d = q.shape
    kv = k.shape[2]
    zeros = lambda x: None if x is None or x.dtype == jnp.int8 else jnp.zeros_like(x)  # noqa: E731
    grads = {name: zeros(getattr(operands, name)) for name in Gradients._fields}
    case = _case(operands, max_length, row_operands=2)
    if not (case.documents or case.own):
        return Gradients(**grads)
    gmem = _gmem(case, operands)
    rows = gmem["q"].shape[3]
    delta = shifted_delta(out, grad_out, grad_lse)
    # A row with nothing to attend to has lse MASKED; the floor keeps its weights at exactly 0.
    scaled_lse = jnp.maximum(lse, MASKED / 2) * gpu_forward.LOG2E
    gmem |= dict(
        grad_out=_pieces(_to_rows(grad_out.astype(q.dtype), kv, rows)),
        lse=_to_rows(scaled_lse, kv, rows),
        delta=_to_rows(delta, kv, rows),
    )
    grad_q, grad_bias = gpu_backward.launch(case, gmem)
    grads["q"] = _from_rows(jnp.sum(grad_q, axis=0), t, h).astype(q.dtype)
    if grad_bias is not None:
        per_row = jnp.moveaxis(jnp.sum(grad_bias, axis=0), 2, 3)  # [B, K, R, k]
        per_token = _from_rows(per_row, t, h)  # [B, T, H, k]
        grads["bias"] = jnp.sum(per_token, axis=1).swapaxes(1, 2).astype(operands.bias.dtype)
    shared = {name: gmem[name] for name in ("q", "grad_out", "lse", "delta")}
    if case.own:
        owners = _owners(case, k, own=case.own)
        own = shared | {name: gmem[name] for name in ("k", "v", "mask")}
        grads["k"], grads["v"] = (grad[:, : case.own] for grad in gpu_owners.launch(owners, own))
    if case.documents and not case.int8:
        owners = _owners(case, bank, ranges=operands.starts.size)
        items, bounds = gpu_owners.candidates(
            operands.starts, operands.lengths, gmem["bank_k"].shape[0], owners.sizes.rows
        )
        shared |= dict(k=gmem["bank_k"], v=gmem["bank_v"], items=items, bounds=bounds)
        if case.biased:
            shared["bias"] = gmem["bias"]
        grads["bank_k"], grads["bank_v"] = (grad[: bank.shape[0]] for grad in gpu_owners.launch(owners, shared))
    return Gradients(**grads)


def _owners(case, owned, *, own=None, ranges=0):
    sizes = gpu_config.choose_owners(
        rows=owned.shape[0] if own is None else own, head_dim=case.head_dim, dtype=case.dtype, owned_dtype=owned.dtype
    )
    return gpu_owners.Owners(
        sizes=sizes,
        own=own,
        tokens=case.tokens,
        group=case.group,
        head_dim=case.head_dim,
        dtype=case.dtype,
        out_dtype=owned.dtype,
        biased=case.biased and own is None,
        ranges=ranges,
    )
