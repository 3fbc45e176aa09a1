"""The arrays of a bank on devices: their shapes, dtypes and shardings, and what they are made of on disk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from msa_jax.bank.manifest import BankSpec
from msa_jax.bank.quantization import quantize_content, quantize_keys
from msa_jax.bank.reader import ARRAYS
from msa_jax.bank.transfer import Field
from msa_jax.errors import BankError

HOST = "pinned_host"
Sharding = jax.sharding.SingleDeviceSharding | jax.sharding.NamedSharding
# By name of the values: their scales, and the axes of the values [L_r, C, M] or [L_r, C, K, D] that scales have.
_SCALES = {
    "routing_keys": ("key_scale", (0, 1)),
    "content_k": ("content_k_scale", (0, 2, 1)),
    "content_v": ("content_v_scale", (0, 2, 1)),
}

# Elements: their float32 intermediates stay in a core's cache, which is twice as fast.
_QUANTISED_AT_ONCE = 1 << 17


def empty(
    spec: BankSpec, chunks: int, dtypes: dict[str, str | None], shardings: dict[str, Sharding]
) -> dict[str, jax.Array]:
    """Zeros for a bank of C = `chunks`, by name; with scales where values are int8.

    Args:
      dtypes: by name of values: "int8", or None for the bank's.
      shardings: by name of values, those that are wanted. Scales lie on the same devices, and never on the host.

    Raises:
      BankError: a dtype that is neither.
    """
    arrays = {}
    for name, sharding in shardings.items():
        dtype, rest = dtypes[name], (spec.width,) if name == "routing_keys" else (spec.kv_heads, spec.head_dim)
        if dtype not in (None, "int8"):
            raise BankError(f"{name} can be loaded as they are stored (None) or as 'int8', not as {dtype!r}.")
        shape = spec.layers, chunks, *rest
        arrays[name] = _zeros(shape, dtype or spec.dtype, sharding)
        if dtype:
            scale, axes = _SCALES[name]
            arrays[scale] = _zeros([shape[a] for a in axes], "float32", _of_axes(sharding, axes))
    return arrays


def resize(arrays: dict[str, jax.Array], chunks: int) -> None:
    """Zeros of another C in place of every array, whose memory is given back before."""
    for name, array in arrays.items():
        shape = [*array.shape]
        shape[_chunk_axis(name)] = chunks
        array.delete()
        arrays[name] = _zeros(shape, array.dtype, array.sharding)


def _zeros(shape, dtype, sharding: Sharding) -> jax.Array:
    if sharding.memory_kind == HOST:
        # Not made on the device, which may be smaller; NumPy's zeros take no memory until they are written.
        if sharding.num_devices == 1:
            return jax.device_put(np.zeros(shape, dtype), sharding)
        part = sharding.shard_shape(tuple(shape))
        return jax.make_array_from_callback(tuple(shape), sharding, lambda _: np.zeros(part, dtype))
    return jnp.zeros(shape, dtype, device=sharding)


def fields_of(arrays: dict[str, jax.Array]) -> dict[str, Field]:
    """How each stored array becomes arrays such as these: as it is, or quantised where there is a scale."""
    stored = [name for name in ARRAYS if name in arrays]
    return {name: _quantised(name) if _SCALES[name][0] in arrays else _as_it_is(name) for name in stored}


def _as_it_is(name: str) -> Field:
    return Field({name: 1}, lambda block: {name: block})


def _quantised(name: str) -> Field:
    scale, quantize = _SCALES[name][0], quantize_keys if name == "routing_keys" else quantize_content

    def make(block: np.ndarray) -> dict[str, np.ndarray]:
        step = max(1, _QUANTISED_AT_ONCE * block.shape[1] // max(1, block.size))
        parts = [quantize(block[:, i : i + step]) for i in range(0, block.shape[1], step)]
        values, scales = zip(*parts, strict=True)
        return {name: np.concatenate(values, axis=1), scale: np.concatenate(scales, axis=_chunk_axis(scale))}

    return Field({name: 1, scale: _chunk_axis(scale)}, make)


def _chunk_axis(name: str) -> int:
    return 2 if name in ("content_k_scale", "content_v_scale") else 1


def _of_axes(sharding: Sharding, axes: tuple[int, ...]) -> Sharding:
    """The sharding of an array on the devices that has these axes only, in this order."""
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        (device,) = sharding.device_set
        return jax.sharding.SingleDeviceSharding(device)
    spec = [*sharding.spec, None, None, None, None]
    return jax.sharding.NamedSharding(sharding.mesh, jax.P(*(spec[a] for a in axes)))
