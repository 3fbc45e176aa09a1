"""Plain JAX form of `gather_attention`: the oracle, and what runs where no kernel does.

Sizes: B questions, T active tokens, S own tokens, H query heads, K key/value heads, G = H / K, D head dim,
C chunks, k documents, W = k * max_length gathered chunks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to attend to gives 0 and not NaN.
MASKED = -1e30


def gather_chunks(starts, lengths, max_length, num_chunks):
    """Chunk index [B, k, max_length], C past a document's end, and whether it is a chunk of the document."""
    offsets = jnp.arange(max_length, dtype=jnp.int32)
    valid = offsets[None, None] < lengths[..., None]
    return jnp.where(valid, starts[..., None] + offsets[None, None], num_chunks), valid


def forward(q, k, v, bank_k, bank_v, starts, lengths, bias, mask, *, max_length):
    """Out [B, T, H, D] in q's dtype and lse [B, T, H] float32. Softmax in float32."""
    b, t, h, d = q.shape
    s, kv = k.shape[1], k.shape[2]
    scale = d**-0.5
    grouped = q.reshape(b, t, kv, h // kv, d)

    def logits_of(keys):
        return scale * jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32)

    causal = jnp.arange(s)[None, :] <= jnp.arange(t)[:, None] + (s - t)
    allowed = causal[None] & mask[:, None, :]
    parts_v = [v]
    logits = jnp.where(allowed[:, None, None], logits_of(k), MASKED)
    if starts.shape[1] and max_length and bank_k.shape[0]:
        num_docs = starts.shape[1]
        index, valid = gather_chunks(starts, lengths, max_length, bank_k.shape[0])
        flat = index.reshape(b, num_docs * max_length)
        # Zeros where there is no chunk: a weight of 0 would not keep a NaN of another document out.
        take = lambda bank: jnp.take(bank, flat, axis=0, mode="fill", fill_value=0)  # noqa: E731
        bank_logits = logits_of(take(bank_k))
        if bias is not None:
            per_chunk = jnp.repeat(bias, max_length, axis=1)
            per_chunk = per_chunk.reshape(b, num_docs * max_length, kv, h // kv).astype(jnp.float32)
            bank_logits = bank_logits + jnp.transpose(per_chunk, (0, 2, 3, 1))[:, :, :, None, :]
        bank_logits = jnp.where(valid.reshape(b, 1, 1, 1, -1), bank_logits, MASKED)
        logits = jnp.concatenate([bank_logits, logits], axis=-1)
        parts_v.insert(0, take(bank_v).astype(v.dtype))
    values = jnp.concatenate(parts_v, axis=1)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(logits > MASKED / 2, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe_total = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum(
        "bkgts,bskd->btkgd", (weights / safe_total).astype(v.dtype), values, preferred_element_type=jnp.float32
    )
    lse = jnp.where(total > 0, top + jnp.log(safe_total), MASKED)[..., 0]
    return out.reshape(b, t, h, d).astype(q.dtype), jnp.transpose(lse, (0, 3, 1, 2)).reshape(b, t, h)
