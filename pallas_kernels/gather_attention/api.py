"""`gather_attention`: stage 3 of Memory Sparse Attention (arXiv 2603.23516, section 3.3)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.gather_attention.reference import MASKED, Operands


def gather_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bank_k: jax.Array,
    bank_v: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    bank_k_scale: jax.Array | None = None,
    bank_v_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    layer: jax.Array | None = None,
    max_length: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One softmax over the chunks of the selected documents and the own tokens, causal.

    Own tokens are aligned at the end: query t of T sees own tokens up to S - T + t, so a template prefix or a
    cache comes first in `k`, `v`. Logits are scaled by 1/sqrt(D). Differentiable in all float arguments but
    the scales.

    Args:
      q: [B, T, H, D].
      k, v: [B, S, K, D], own tokens, S >= T, or S = 0 for the bank alone; H is a multiple of K.
      bank_k, bank_v: [C, K, D], pooled content of every chunk, float or int8 (then the scales are needed).
      starts, lengths: [B, k] int32, range of chunks of each selected document; length 0 selects nothing. What
        a range has outside of the bank does not count.
      bank_k_scale, bank_v_scale: [K, C] float32: content is `bank_k[c, h] * bank_k_scale[h, c]`. Chunks are
        the last axis, so that a kernel reads the scales of a range as one contiguous piece per head.
      bias: [B, k, H] float32, added to the logits of all chunks of a document.
      mask: [B, S] bool, own tokens that exist; default all. The others must hold finite numbers.
      layer: scalar int32: the bank is [L, C, K, D] (its scales [L, K, C]), and this layer of it is read where it
        lies. In a scan over layers that spares a copy of every layer's bank; for training pass a layer's own
        arrays, as the gradient has the size of what is passed.
      max_length: the most chunks a document has (a static bound on `lengths`); the XLA form gathers
        k * max_length chunks a question. Default C: always right, seldom what you want. A range longer than
        this is cut off.
      implementation: None for the best of the platform, or "xla", "tpu", "gpu", which never falls back.

    Returns:
      out [B, T, H, D] in q's dtype and lse [B, T, H] float32, the log of the softmax denominator, by which
      partial results merge (`merge`). A token with nothing to attend to gets out 0 and lse -1e30.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: the named implementation cannot run this.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"gather_attention: need q [B, T, H, D], k, v [B, S, K, D], got {q.shape}, {k.shape}, {v.shape}."
        )
    b, t, h, d = q.shape
    s, kv = k.shape[1], k.shape[2]
    if kv == 0 or h % kv or 0 < s < t:
        raise ValueError(
            f"gather_attention: need H a multiple of K and S >= T or S = 0, got H {h}, K {kv}, S {s}, T {t}."
        )
    layers = "" if layer is None else "L, "
    if bank_k.shape != bank_v.shape or bank_k.ndim != (3 if layer is None else 4) or bank_k.shape[-2:] != (kv, d):
        raise ValueError(
            f"gather_attention: bank_k, bank_v must be [{layers}C, K, D] with K {kv}, D {d}, "
            f"got {bank_k.shape}, {bank_v.shape}."
        )
    scales = (bank_k_scale, bank_v_scale)
    if bank_k.dtype != bank_v.dtype or any((bank_k.dtype == jnp.int8) != (scale is not None) for scale in scales):
        raise ValueError(
            "gather_attention: bank_k and bank_v need one dtype, and bank_k_scale, bank_v_scale if it is int8 and "
            f"only then; got {bank_k.dtype}, {bank_v.dtype}."
        )
    num_chunks = bank_k.shape[-3]
    scale_shape = (*bank_k.shape[:-3], kv, num_chunks)
    if any(scale is not None and scale.shape != scale_shape for scale in scales):
        raise ValueError(
            f"gather_attention: bank_k_scale, bank_v_scale must be [{layers}K, C] = {scale_shape}, "
            f"got {bank_k_scale.shape}, {bank_v_scale.shape}."
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
    max_length = num_chunks if max_length is None else min(max_length, num_chunks)
    # A range that begins before the bank loses what lies there; one that ends after it is cut.
    ends = jnp.clip(starts + jnp.minimum(lengths, max_length), 0, num_chunks)
    starts = jnp.clip(starts, 0, num_chunks)
    lengths = jnp.maximum(ends - starts, 0)
    if layer is not None:
        # The chunks of all layers are one long bank.
        layer = jnp.asarray(layer, jnp.int32)
        starts = starts + layer * num_chunks
        bank_k, bank_v = (x.reshape(-1, kv, d) for x in (bank_k, bank_v))
    operands = Operands(
        q=q,
        k=k,
        v=v,
        bank_k=bank_k,
        bank_v=bank_v,
        bank_k_scale=bank_k_scale,
        bank_v_scale=bank_v_scale,
        starts=starts.astype(jnp.int32),
        lengths=lengths.astype(jnp.int32),
        bias=bias,
        mask=mask,
        layer=layer,
    )
    module = dispatch.choose("gather_attention", implementation, operands=operands)
    return _gather_attention(module, max_length, operands)


def merge(outs: Sequence[jax.Array] | jax.Array, lses: Sequence[jax.Array] | jax.Array) -> tuple[jax.Array, jax.Array]:
    """The attention over the union of disjoint parts, from the attention over each.

    Args:
      outs: n arrays [B, T, H, D], or one [n, B, T, H, D].
      lses: n arrays [B, T, H] float32, or one [n, B, T, H].

    Returns:
      out [B, T, H, D] in the dtype of `outs` and lse [B, T, H], as one call over all parts gives them, to
      rounding. Where no part had anything to attend to: 0 and -1e30.
    """
    lses = jnp.stack(list(lses)) if not isinstance(lses, jax.Array) else lses
    outs = jnp.stack(list(outs)) if not isinstance(outs, jax.Array) else outs
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"merge: need outs [n, B, T, H, D] and lses [n, B, T, H], got {outs.shape}, {lses.shape}.")
    top = jnp.maximum(jnp.max(lses, axis=0), MASKED / 2)
    weights = jnp.exp(lses - top[None])
    total = jnp.sum(weights, axis=0)
    safe_total = jnp.where(total > 0, total, 1.0)
    out = jnp.sum(outs.astype(jnp.float32) * weights[..., None], axis=0) / safe_total[..., None]
    return out.astype(outs.dtype), jnp.where(total > 0, top + jnp.log(safe_total), MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_attention(module, max_length, operands):
    return module.forward(operands, max_length=max_length)


def _fwd(module, max_length, operands):
    out, lse = module.forward(operands, max_length=max_length)
    return (out, lse), (operands, out, lse)


def _bwd(module, max_length, residuals, grads):
    operands, out, lse = residuals
    gradients = module.backward(operands, out, lse, *grads, max_length=max_length)._asdict()
    return (Operands(*(_gradient(gradients.get(name), x) for name, x in operands._asdict().items())),)


def _gradient(gradient, x):
    if x is None or gradient is not None:
        return gradient
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros_like(x) if floating else np.zeros(x.shape, jax.dtypes.float0)


_gather_attention.defvjp(_fwd, _bwd)
