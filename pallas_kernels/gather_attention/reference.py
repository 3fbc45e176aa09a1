"""Plain JAX form of `gather_attention`: the oracle, and what runs where no kernel does.

Sizes: B questions, T active tokens, S own tokens, H query heads, K key/value heads, G = H / K, D head dim,
C chunks, k documents, W = k * max_length gathered chunks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to attend to gives 0 and not NaN.
MASKED = -1e30


class Operands(NamedTuple):
    """What every implementation takes: the arguments of `gather_attention`, checked; ranges lie within the bank."""

    q: jax.Array  # [B, T, H, D]
    k: jax.Array  # [B, S, K, D]; S >= T, or 0
    v: jax.Array  # [B, S, K, D]
    bank_k: jax.Array  # [C, K, D] float or int8
    bank_v: jax.Array  # [C, K, D]
    bank_k_scale: jax.Array | None  # [K, C] float32 with an int8 bank; [L, K, C / L] with a layer
    bank_v_scale: jax.Array | None
    starts: jax.Array  # [B, k] int32
    lengths: jax.Array  # [B, k] int32
    bias: jax.Array | None  # [B, k, H] float32
    mask: jax.Array  # [B, S] bool
    layer: jax.Array | None = None  # scalar int32: the bank holds the chunks of L layers, `starts` are in this one's


class Gradients(NamedTuple):
    """Gradients of the float operands, in their dtypes; None for an int8 bank and for an absent bias."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bank_k: jax.Array | None
    bank_v: jax.Array | None
    bias: jax.Array | None


class _Part(NamedTuple):
    """One part of the softmax: the own tokens, or the gathered chunks; s columns."""

    logits: jax.Array  # [B, K, G, T, s] float32
    allowed: jax.Array  # broadcasts against `logits`
    keys: jax.Array  # [B, s, K, D]
    values: jax.Array  # [B, s, K, D]


def unsupported(*, operands) -> str | None:
    """Why a case cannot run, or None: this form runs every one."""
    del operands
    return None


def gather_chunks(starts, lengths, max_length, num_chunks):
    """Chunk index [B, k, max_length], C past a document's end, and whether it is a chunk of the document."""
    offsets = jnp.arange(max_length, dtype=jnp.int32)
    valid = offsets[None, None] < lengths[..., None]
    return jnp.where(valid, starts[..., None] + offsets[None, None], num_chunks), valid


def _grouped(x, kv):
    """[B, T, H, ...] -> [B, T, K, G, ...]."""
    return x.reshape(*x.shape[:2], kv, x.shape[2] // kv, *x.shape[3:])


def _take(bank, scale, layer, index, dtype):
    """Chunks [B, W] of `bank`; zeros where there is none: a weight of 0 would not keep another's NaN out."""
    taken = jnp.take(bank, index, axis=0, mode="fill", fill_value=0)
    if scale is None:
        return taken.astype(dtype)
    if layer is not None:
        index = jnp.where(index < bank.shape[0], index - layer * scale.shape[-1], scale.shape[-1])
        scale = scale[layer]
    scales = jnp.take(scale, index, axis=1, mode="fill", fill_value=0)  # [K, B, W]
    return (taken.astype(jnp.float32) * jnp.moveaxis(scales, 0, -1)[..., None]).astype(dtype)


def _parts(operands: Operands, max_length: int) -> tuple[list[_Part], jax.Array | None]:
    """Own tokens (if any) and chunks (if any), and the index [B, W] of the chunks."""
    q, k, v = operands[:3]
    b, t, h, d = q.shape
    s, kv = k.shape[1], k.shape[2]
    grouped = _grouped(q, kv)

    def logits_of(keys):
        return d**-0.5 * jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32)

    parts, index = [], None
    if s:
        causal = jnp.arange(s)[None, :] <= jnp.arange(t)[:, None] + (s - t)
        allowed = (causal[None] & operands.mask[:, None, :])[:, None, None]
        parts.append(_Part(logits_of(k), allowed, k, v))
    selected, num_chunks = operands.starts.shape[1], operands.bank_k.shape[0]
    if selected and max_length and num_chunks:
        chunks = selected * max_length
        index, valid = gather_chunks(operands.starts, operands.lengths, max_length, num_chunks)
        index = index.reshape(b, chunks)
        keys = _take(operands.bank_k, operands.bank_k_scale, operands.layer, index, q.dtype)
        logits = logits_of(keys)
        if operands.bias is not None:
            per_chunk = jnp.repeat(operands.bias.astype(jnp.float32), max_length, axis=1)
            logits = logits + jnp.transpose(_grouped(per_chunk, kv), (0, 2, 3, 1))[:, :, :, None, :]
        values = _take(operands.bank_v, operands.bank_v_scale, operands.layer, index, q.dtype)
        parts.append(_Part(logits, valid.reshape(b, 1, 1, 1, chunks), keys, values))
    return parts, index


def _rows(x):
    """[B, K, G, T, ...] -> [B, T, H, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _rows_inverse(x, kv):
    """[B, T, H, ...] -> [B, K, G, T, ...]."""
    return jnp.moveaxis(_grouped(x, kv), 1, 3)


def forward(operands: Operands, *, max_length: int) -> tuple[jax.Array, jax.Array]:
    """Out [B, T, H, D] in q's dtype and lse [B, T, H] float32. Softmax in float32.

    Bank and own tokens are two parts of one softmax under a common maximum: nothing is concatenated.
    """
    q = operands.q
    parts, _ = _parts(operands, max_length)
    if not parts:
        return jnp.zeros_like(q), jnp.full(q.shape[:3], MASKED, jnp.float32)
    tops = [jnp.max(jnp.where(p.allowed, p.logits, MASKED), axis=-1, keepdims=True) for p in parts]
    # Far above MASKED, so that masked weights are exactly 0, in a row of nothing else too.
    top = jnp.maximum(functools.reduce(jnp.maximum, tops), MASKED / 2)
    out, total = 0.0, 0.0
    for part in parts:
        weights = jnp.exp(jnp.where(part.allowed, part.logits, MASKED) - top)
        total = total + jnp.sum(weights, axis=-1, keepdims=True)
        values = part.values
        out = out + jnp.einsum(
            "bkgts,bskd->bkgtd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
    safe_total = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log(safe_total), MASKED)
    return _rows(out / safe_total).astype(q.dtype), _rows(lse[..., 0])


def shifted_delta(out, grad_out, grad_lse):
    """What the softmax subtracts from every weight's gradient: sum_d out * grad_out - grad_lse, [B, T, H] float32."""
    return jnp.sum(out.astype(jnp.float32) * grad_out.astype(jnp.float32), axis=-1) - grad_lse


def backward(operands: Operands, out, lse, grad_out, grad_lse, *, max_length: int) -> Gradients:
    """Gradients, with the weights computed anew from `lse`: nothing of size T x W is kept between the passes.

    With weights p = exp(logits - lse): d logits = p * (grad_out . value - shifted_delta).
    """
    q, kv = operands.q, operands.k.shape[2]
    scale = q.shape[3] ** -0.5
    grouped, grad_grouped = _grouped(q, kv), _grouped(grad_out.astype(q.dtype), kv)
    delta = _rows_inverse(shifted_delta(out, grad_out, grad_lse), kv)[..., None]
    # A row with nothing to attend to has lse MASKED; the floor keeps its weights at exactly 0.
    top = jnp.maximum(_rows_inverse(lse, kv)[..., None], MASKED / 2)
    parts, index = _parts(operands, max_length)
    contract = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    grad_q, grads = jnp.zeros(grouped.shape, jnp.float32), []
    for part in parts:
        weights = jnp.exp(jnp.where(part.allowed, part.logits, MASKED) - top)
        grad_weights = contract("btkgd,bskd->bkgts", grad_grouped, part.values)
        grad_logits = weights * (grad_weights - delta)
        narrow = grad_logits.astype(q.dtype)
        grad_q = grad_q + scale * contract("bkgts,bskd->btkgd", narrow, part.keys)
        grad_keys = scale * contract("bkgts,btkgd->bskd", narrow, grouped)
        grad_values = contract("bkgts,btkgd->bskd", weights.astype(q.dtype), grad_grouped)
        grads.append((grad_keys, grad_values, grad_logits))

    own = grads[0][:2] if operands.k.shape[1] else (jnp.zeros(operands.k.shape, jnp.float32),) * 2
    floats = jnp.issubdtype(operands.bank_k.dtype, jnp.floating)
    bank = [jnp.zeros(operands.bank_k.shape, jnp.float32)] * 2 if floats else [None, None]
    grad_bias = None if operands.bias is None else jnp.zeros(operands.bias.shape, jnp.float32)
    if index is not None:
        if floats:
            bank = [whole.at[index].add(part, mode="drop") for whole, part in zip(bank, grads[-1][:2], strict=True)]
        if grad_bias is not None:
            per_chunk = _rows(jnp.sum(grads[-1][2], axis=3, keepdims=True).swapaxes(3, 4))  # [B, W, H, 1]
            grad_bias = per_chunk.reshape(*operands.starts.shape, max_length, q.shape[2]).sum(axis=2)
    cast = lambda grad, like: None if grad is None else grad.astype(like.dtype)  # noqa: E731
    return Gradients(
        q=cast(grad_q.reshape(q.shape), q),
        k=cast(own[0], operands.k),
        v=cast(own[1], operands.v),
        bank_k=cast(bank[0], operands.bank_k),
        bank_v=cast(bank[1], operands.bank_v),
        bias=cast(grad_bias, operands.bias),
    )
