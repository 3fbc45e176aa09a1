"""Plain JAX form of `gather_attention`: the oracle, and what runs where no kernel does.

Sizes: B questions, T active tokens, S own tokens, H query heads, K key/value heads, G = H / K, D head dim,
C chunks, k documents, W = k * max_length gathered chunks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to attend to gives 0 and not NaN.
MASKED = -1e30


def gather_chunks(starts, lengths, max_length, num_chunks):
    """Chunk index [B, k, max_length], C past a document's end, and whether it is a chunk of the document."""
    offsets = jnp.arange(max_length, dtype=jnp.int32)
    valid = offsets[None, None] < lengths[..., None]
    return jnp.where(valid, starts[..., None] + offsets[None, None], num_chunks), valid


def _attend(logits, allowed, values, top):
    """Unnormalised weighted values [B, K, G, T, D] and weight sums [B, K, G, T, 1] of one part of the softmax."""
    # `top` is far above MASKED, so that masked weights are exactly 0, in a row of nothing else too.
    weights = jnp.exp(jnp.where(allowed, logits, MASKED) - top)
    summed = jnp.einsum(
        "bkgts,bskd->bkgtd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return summed, jnp.sum(weights, axis=-1, keepdims=True)


def forward(q, k, v, bank_k, bank_v, starts, lengths, bias, mask, *, max_length):
    """Out [B, T, H, D] in q's dtype and lse [B, T, H] float32. Softmax in float32.

    Bank and own tokens are two parts of one softmax under a common maximum: nothing is concatenated.
    """
    b, t, h, d = q.shape
    s, kv = k.shape[1], k.shape[2]
    grouped = q.reshape(b, t, kv, h // kv, d)

    def logits_of(keys):
        return d**-0.5 * jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32)

    causal = jnp.arange(s)[None, :] <= jnp.arange(t)[:, None] + (s - t)
    parts = [(logits_of(k), (causal[None] & mask[:, None, :])[:, None, None], v)]
    if starts.shape[1] and max_length and bank_k.shape[0]:
        chunks = starts.shape[1] * max_length
        index, valid = gather_chunks(starts, lengths, max_length, bank_k.shape[0])
        flat = index.reshape(b, chunks)
        # Zeros where there is no chunk: a weight of 0 would not keep a NaN of another document out.
        take = lambda bank: jnp.take(bank, flat, axis=0, mode="fill", fill_value=0).astype(q.dtype)  # noqa: E731
        logits = logits_of(take(bank_k))
        if bias is not None:
            per_chunk = jnp.repeat(bias.astype(jnp.float32), max_length, axis=1)
            per_chunk = per_chunk.reshape(b, chunks, kv, h // kv)
            logits = logits + jnp.transpose(per_chunk, (0, 2, 3, 1))[:, :, :, None, :]
        parts.append((logits, valid.reshape(b, 1, 1, 1, chunks), take(bank_v)))
    tops = [jnp.max(jnp.where(allowed, logits, MASKED), axis=-1, keepdims=True) for logits, allowed, _ in parts]
    top = jax.lax.stop_gradient(jnp.maximum(functools.reduce(jnp.maximum, tops), MASKED / 2))
    sums = [_attend(logits, allowed, values, top) for logits, allowed, values in parts]
    total = sum(weight for _, weight in sums)
    safe_total = jnp.where(total > 0, total, 1.0)
    out = sum(value for value, _ in sums) / safe_total
    lse = jnp.where(total > 0, top + jnp.log(safe_total), MASKED)
    order = (0, 3, 1, 2, 4)
    return (
        jnp.transpose(out, order).reshape(b, t, h, d).astype(q.dtype),
        jnp.transpose(lse, order).reshape(b, t, h),
    )
