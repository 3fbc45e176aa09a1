"""Losses and router metrics of MSA training (arXiv 2603.23516, section 3.4).

Sizes: B questions, N documents, E hidden, V vocabulary, L_r router layers, k documents selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

RouterLoss = Literal["infonce", "infonce_decoupled", "infonce_focal", "infonce_decoupled_focal"]
ROUTER_LOSSES = ("infonce", "infonce_decoupled", "infonce_focal", "infonce_decoupled_focal")

# Finite, so that no difference of two of them and no gradient is NaN.
_MASKED = -1e30


def vocabulary_block(vocab_size: int, limit: int) -> int:
    """Rows of the output embedding scored at once: `vocab_size` if it fits, else its largest divisor in
    (limit / 2, limit], which spares a padded copy of the table, else `limit`."""
    if vocab_size <= limit:
        return vocab_size
    return next((n for n in range(limit, limit // 2, -1) if vocab_size % n == 0), limit)


def token_losses(
    hidden: jax.Array, output_embedding: jax.Array, targets: jax.Array, *, block: int = 4096
) -> jax.Array:
    """Cross-entropy of every token, without ever holding [tokens, V], forward or backward.

    The vocabulary is scanned in blocks under an online log-sum-exp, and the backward pass computes each
    block again. Peak memory beyond inputs and their gradients is O(tokens * (block + E)).

    Args:
      hidden: [..., E], after the final norm; products are taken in its dtype and summed in float32.
      output_embedding: [V, E].
      targets: [...] int32 in 0..V-1; a token with another target gets a meaningless loss.
      block: the most rows of `output_embedding` scored at once.

    Returns:
      [...] float32, nats.

    Raises:
      ValueError: shapes that do not fit together, or `block` below 1.
    """
    if hidden.shape[:-1] != targets.shape or output_embedding.shape[1:] != hidden.shape[-1:] or block < 1:
        raise ValueError(
            f"token_losses: need hidden [..., E], output_embedding [V, E], targets [...] and block >= 1, "
            f"got {hidden.shape}, {output_embedding.shape}, {targets.shape} and {block}."
        )
    vocab_size, width = output_embedding.shape
    size = vocabulary_block(vocab_size, block)
    blocks = -(-vocab_size // size)
    dtype = hidden.dtype
    # In float32 outside the scan, so that its gradient is summed over blocks in float32.
    tokens = hidden.reshape(-1, width).astype(jnp.float32)
    flat_targets = targets.reshape(-1)

    def step(carry, inputs):
        top, total, chosen = carry
        rows, start = inputs
        logits = jnp.einsum(
            "te,ve->tv", tokens.astype(dtype), rows.astype(dtype), preferred_element_type=jnp.float32
        )
        if blocks * size != vocab_size:
            logits = jnp.where(start + jnp.arange(size) < vocab_size, logits, _MASKED)
        new_top = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(logits, axis=1)))
        total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[:, None]), axis=1)
        index = flat_targets - start
        inside = (index >= 0) & (index < size)
        picked = jnp.take_along_axis(logits, jnp.where(inside, index, 0)[:, None], axis=1)[:, 0]
        return (new_top, total, chosen + jnp.where(inside, picked, 0.0)), None

    zeros = jnp.zeros(tokens.shape[0], jnp.float32)
    carry = (jnp.full_like(zeros, _MASKED), zeros, zeros)
    if blocks == 1:
        (top, total, chosen), _ = step(carry, (output_embedding, 0))
    else:
        table = output_embedding
        if blocks * size != vocab_size:
            table = jnp.pad(table, ((0, blocks * size - vocab_size), (0, 0)))
        xs = (table.reshape(blocks, size, width), jnp.arange(blocks, dtype=jnp.int32) * size)
        (top, total, chosen), _ = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, xs)
    return (top + jnp.log(total) - chosen).reshape(targets.shape)


def lm_loss(
    hidden: jax.Array,
    output_embedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    block: int = 4096,
) -> tuple[jax.Array, jax.Array]:
    """Weighted cross-entropy and its weight, as sums: their quotient is the loss, and sums add over devices.

    Args:
      hidden, output_embedding, targets, block: as in `token_losses`; targets [...] where `weights` is 0 are
        free, -100 included.
      weights: [...] float32, 0 where a token has no label.

    Returns:
      `(sum of weight * loss, sum of weight)`, float32 scalars.
    """
    weights = weights.astype(jnp.float32)
    losses = token_losses(hidden, output_embedding, targets, block=block)
    return jnp.sum(jnp.where(weights != 0, losses * weights, 0.0)), jnp.sum(weights)


def _logsumexp(x, mask):
    top = jax.lax.stop_gradient(jnp.max(jnp.where(mask, x, _MASKED), axis=-1, keepdims=True))
    total = jnp.sum(jnp.where(mask, jnp.exp(jnp.where(mask, x - top, 0.0)), 0.0), axis=-1, keepdims=True)
    some = total > 0
    return jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), _MASKED)


def has_positive(relevant: jax.Array, visible: jax.Array) -> jax.Array:
    """[..., B] bool: samples that count in a mean of `router_loss` or of recall."""
    return jnp.any(relevant & visible, axis=-1)


def router_loss(
    scores: jax.Array,
    relevant: jax.Array,
    visible: jax.Array,
    *,
    method: RouterLoss,
    temperature: float = 0.1,
    gamma: float | jax.Array = 2.0,
) -> jax.Array:
    """Contrastive loss of each sample on its document scores: `-log p` of each positive, their mean.

    `p` is the softmax at `temperature` over all visible documents, or in the decoupled forms over one
    positive and all negatives (paper eq. 5), so that positives do not compete. The focal forms weight each
    term by `(1 - p)^gamma`, through which gradients flow.

    Args:
      scores: [..., B, N] float32, for example of all router layers at once.
      relevant: [..., B, N] bool, the positives.
      visible: [..., B, N] bool; other documents take no part, whatever their score.
      method: one of `ROUTER_LOSSES`.
      temperature: positive.
      gamma: at least 1; a float, or an array that broadcasts against [..., B, 1].

    Returns:
      [..., B] float32; 0 for a sample without a visible positive, to be left out of a mean (`has_positive`).

    Raises:
      ValueError: an unknown method.
    """
    if method not in ROUTER_LOSSES:
        raise ValueError(f"router_loss: method must be one of {ROUTER_LOSSES}, got {method!r}.")
    # Before the division, so that a sentinel score cannot overflow.
    visible = jnp.broadcast_to(visible, scores.shape)
    positive = visible & jnp.broadcast_to(relevant, scores.shape)
    logits = jnp.where(visible, scores.astype(jnp.float32), 0.0) / temperature
    if "decoupled" in method:
        losses = jax.nn.softplus(_logsumexp(logits, visible & ~positive) - logits)
    else:
        losses = _logsumexp(logits, visible) - logits
    losses = jnp.where(positive, losses, 0.0)
    if "focal" in method:
        # 1 - p without cancellation; rounding may put the loss of a sure positive below 0.
        miss = jnp.maximum(-jnp.expm1(-losses), 0.0)
        losses = losses * miss ** jax.lax.stop_gradient(gamma)
    return jnp.sum(losses, axis=-1) / jnp.maximum(jnp.sum(positive, axis=-1), 1)


def recall_at(
    scores: jax.Array, relevant: jax.Array, visible: jax.Array, n: int, *, most: int | None = None
) -> jax.Array:
    """Share of the positives among the n best visible documents, [..., B] float32; 0 without positives.

    Args:
      scores: [..., B, N] float32.
      relevant, visible: [..., B, N] bool.
      n: how many documents are looked at.
      most: positives counted at most, the divisor is `min(positives, most)`; default n.
    """
    visible = jnp.broadcast_to(visible, scores.shape)
    positive = visible & jnp.broadcast_to(relevant, scores.shape)
    best, index = jax.lax.top_k(jnp.where(visible, scores, _MASKED), min(n, scores.shape[-1]))
    hits = jnp.take_along_axis(positive, index, axis=-1) & (best > _MASKED / 2)
    possible = jnp.minimum(jnp.sum(positive, axis=-1), n if most is None else most)
    return jnp.sum(hits, axis=-1) / jnp.maximum(possible, 1).astype(jnp.float32)


def router_metrics(
    scores: jax.Array,
    relevant: jax.Array,
    visible: jax.Array,
    *,
    selected: jax.Array,
    lengths: jax.Array,
    recall: Sequence[int] = (1, 5, 10, 16),
) -> dict[str, jax.Array]:
    """How well the router finds documents: float32 scalars by name.

    Args:
      scores: [L_r, B, N] float32.
      relevant, visible: [B, N] bool.
      selected: [L_r, B, k] int32, documents that each layer read.
      lengths: [L_r, B, k] int32, 0 where nothing was selected (`Selection.lengths`).
      recall: the n of recall@n.

    Returns:
      `recall@n` (mean over router layers) and `recall@n/router_i` (of the i-th), over samples with positives;
      `precision`, relevant ones among the selected; `distinct`, different documents among those that the
      batch selected, 1 when no two questions of a layer read the same; `empty`, questions that read nothing.
    """
    layers, _, documents = scores.shape
    counted = has_positive(relevant, visible).astype(jnp.float32)
    weights = (counted / jnp.maximum(jnp.sum(counted), 1.0))[None]
    metrics = {}
    for n in recall:
        values = jnp.sum(recall_at(scores, relevant, visible, n) * weights, axis=-1)
        metrics[f"recall@{n}"] = values.mean()
        metrics |= {f"recall@{n}/router_{i}": values[i] for i in range(layers)}
    found = lengths > 0
    total = jnp.maximum(jnp.sum(found), 1).astype(jnp.float32)
    hits = jnp.take_along_axis(jnp.broadcast_to(relevant, scores.shape), selected, axis=-1) & found
    read = jnp.zeros((layers, documents), bool).at[jnp.arange(layers)[:, None, None], selected].max(found)
    metrics["precision"] = jnp.sum(hits) / total
    metrics["distinct"] = jnp.sum(read) / total
    metrics["empty"] = jnp.mean(~jnp.any(found, axis=-1), dtype=jnp.float32)
    return metrics
