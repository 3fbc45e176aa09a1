"""Banks in int8: half the bytes of bfloat16, symmetric, one float32 scale a routing key and a content vector.

Sizes: L_r router layers, C chunks, K key/value heads, D head dim, M = K * D.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from msa_jax.memory import MemoryBank

LARGEST = 127
# Of vectors that are zero or nearly so: a scale that is positive, and normal, so that no hardware takes it for zero.
_LEAST_SCALE = np.float32(np.finfo(np.float32).tiny)


def quantize_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Routing keys as int8. A key is `quantized * scale`, at most half a scale off in every element.

    The chunks of a piece are independent, so a bank may be quantised piece by piece while it is read.

    Args:
      keys: [..., C, M] float, on the host.

    Returns:
      int8 [..., C, M], and scales [..., C] float32, positive: a zero key stays zero.

    Raises:
      ValueError: a key is not finite.
    """
    return _host_rows("quantize_keys", keys)


def quantize_content(content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Content keys or values as int8, one scale a chunk and head; see `quantize_keys`.

    Args:
      content: [..., C, K, D] float, on the host.

    Returns:
      int8 [..., C, K, D], and scales [..., K, C] float32: chunks last, as the kernels read them.

    Raises:
      ValueError: a vector is not finite.
    """
    values, scale = _host_rows("quantize_content", content)
    return values, np.ascontiguousarray(np.swapaxes(scale, -1, -2))


def quantize(bank: MemoryBank, *, keys: bool = True, content: bool = True) -> MemoryBank:
    """A bank on the device as int8. May be traced; what is int8 already stays as it is.

    Args:
      bank: content on the device.
      keys: quantise the routing keys.
      content: quantise K and V of the content.

    Raises:
      ValueError: arrays that do not fit together, or content elsewhere.
    """
    bank.check()
    if content and bank.tier != "device":
        raise ValueError(f"quantize: content must be on the device, this bank's is on the {bank.tier}.")
    if keys and bank.routing_keys.dtype != jnp.int8:
        values, scale = _device_rows(bank.routing_keys)
        bank = bank.replace(routing_keys=values, key_scale=scale)
    if content and bank.content_k.dtype != jnp.int8:
        k, k_scale = _device_rows(bank.content_k)
        v, v_scale = _device_rows(bank.content_v)
        chunks_last = lambda scale: jnp.swapaxes(scale, -1, -2)  # noqa: E731
        bank = bank.replace(
            content_k=k, content_v=v, content_k_scale=chunks_last(k_scale), content_v_scale=chunks_last(v_scale)
        )
    return bank


def _scales(x, xp):
    return xp.maximum(xp.max(xp.abs(x), axis=-1) / LARGEST, _LEAST_SCALE)


def _values(x, scale, xp):
    # The quotient of the largest element may round to beyond 127 by no more than one step of float32.
    return xp.clip(xp.round(x / scale[..., None]), -LARGEST, LARGEST).astype(xp.int8)


@jax.jit
def _device_rows(x):
    """[..., D] as int8 and a scale [...] of every row; compiled, so that there is no float32 copy of a bank."""
    x = x.astype(jnp.float32)
    scale = _scales(x, jnp)
    return _values(x, scale, jnp), scale


def _host_rows(what, x):
    x = np.asarray(x).astype(np.float32)
    scale = _scales(x, np)
    if not np.isfinite(scale).all():
        raise ValueError(f"{what}: every vector must be finite, {np.count_nonzero(~np.isfinite(scale))} are not.")
    return _values(x, scale, np), scale
