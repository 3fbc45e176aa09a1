"""`gather_attention`: stage 3 of Memory Sparse Attention (arXiv 2603.23516, section 3.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import resolve
from pallas_kernels.gather_attention import reference


def gather_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bank_k: jax.Array,
    bank_v: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    max_length: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One softmax over the chunks of the selected documents and the own tokens, causal.

    Own tokens are aligned at the end: query t of T sees own tokens up to S - T + t, so a template prefix or a
    cache comes first in `k`, `v`. Logits are scaled by 1/sqrt(D). Differentiable in all float arguments.

    Args:
      q: [B, T, H, D].
      k, v: [B, S, K, D], S >= T, own tokens; H is a multiple of K.
      bank_k, bank_v: [C, K, D], pooled content of every chunk.
      starts, lengths: [B, k] int32, range of chunks of each selected document; length 0 selects nothing.
      bias: [B, k, H] float32, added to the logits of all chunks of a document.
      mask: [B, S] bool, own tokens that exist; default all.
      max_length: the most chunks a document has (a static bound on `lengths`); the XLA form gathers
        k * max_length chunks a question. Default C: always right, seldom what you want. A range longer than
        this is cut off.
      implementation: None for the best of the platform, or "xla", "tpu", "gpu", which never falls back.

    Returns:
      out [B, T, H, D] in q's dtype and lse [B, T, H] float32, the log of the softmax denominator, by which
      partial results merge. A token with nothing to attend to gets out 0 and lse -1e30.

    Raises:
      ValueError: shapes that do not fit together.
      NotImplementedError: the named implementation cannot run this.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"gather_attention: need q [B, T, H, D], k, v [B, S, K, D], got {q.shape}, {k.shape}, {v.shape}."
        )
    b, t, h, d = q.shape
    s, kv = k.shape[1], k.shape[2]
    if h % kv or s < t:
        raise ValueError(f"gather_attention: need H a multiple of K and S >= T, got H {h}, K {kv}, S {s}, T {t}.")
    if bank_k.shape != bank_v.shape or bank_k.ndim != 3 or bank_k.shape[1:] != (kv, d):
        raise ValueError(
            f"gather_attention: bank_k, bank_v must be [C, K, D] with K {kv}, D {d}, "
            f"got {bank_k.shape}, {bank_v.shape}."
        )
    if starts.shape != lengths.shape or starts.ndim != 2 or starts.shape[0] != b:
        raise ValueError(
            f"gather_attention: starts, lengths must be [B, k] with B {b}, got {starts.shape}, {lengths.shape}."
        )
    if bias is not None and bias.shape != (*starts.shape, h):
        raise ValueError(f"gather_attention: bias must be [B, k, H] = {(*starts.shape, h)}, got {bias.shape}.")
    if mask is None:
        mask = jnp.ones((b, s), bool)
    if mask.shape != (b, s) or mask.dtype != jnp.bool_:
        raise ValueError(f"gather_attention: mask must be bool [B, S] = {(b, s)}, got {mask.dtype} {mask.shape}.")
    resolve("gather_attention", implementation, ("xla",))
    max_length = bank_k.shape[0] if max_length is None else max_length
    return reference.forward(q, k, v, bank_k, bank_v, starts, lengths, bias, mask, max_length=max_length)
