"""The memory bank as arrays: pytrees that layers read, jit-compiled steps carry, and stores load into.

Sizes: L_r router layers, C chunks, N documents, K key/value heads, D head dim, M = K * D.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class DocumentLayout:
    """Which chunks belong to which document. The chunks of a document are consecutive.

    Attributes:
      chunk_documents: [C] int32, ascending over the chunks in use; N marks a chunk of no document.
      starts: [N] int32, first chunk of each document.
      lengths: [N] int32, chunks of each document; 0 means that there is no such document.
      max_length: a static bound on `lengths`.
      axes: mesh axes over which chunks and documents are spread, in equal parts; a document's chunks lie in the part
        that it lies in. None: the memory is on one device.
    """

    chunk_documents: jax.Array
    starts: jax.Array
    lengths: jax.Array
    max_length: int = struct.field(pytree_node=False)
    axes: tuple[str, ...] | None = struct.field(pytree_node=False, default=None)

    @property
    def num_documents(self) -> int:
        return self.starts.shape[0]

    @property
    def num_chunks(self) -> int:
        return self.chunk_documents.shape[0]

    @classmethod
    def from_chunk_documents(cls, chunk_documents, num_documents: int) -> DocumentLayout:
        """Derive the ranges from concrete `chunk_documents` [C].

        Raises:
          ValueError: not integers [C] in 0..N, or the chunks of a document are not consecutive.
        """
        owners = np.asarray(chunk_documents)
        if owners.ndim != 1 or (owners.size and not np.issubdtype(owners.dtype, np.integer)):
            raise ValueError(
                f"DocumentLayout: chunk_documents must be integers [C], got {owners.dtype} {owners.shape}."
            )
        if owners.size and not (0 <= owners.min() and owners.max() <= num_documents):
            raise ValueError(
                f"DocumentLayout: chunk_documents must lie in 0 to {num_documents} ({num_documents} marks a chunk "
                f"of no document), they lie in {owners.min()} to {owners.max()}."
            )
        owners = owners.astype(np.int32)
        used = owners[owners < num_documents]
        lengths = np.bincount(used, minlength=num_documents).astype(np.int32)
        starts = np.zeros(num_documents, np.int32)
        starts[owners[::-1][owners[::-1] < num_documents]] = np.flatnonzero(owners < num_documents)[::-1]
        changes = np.count_nonzero(np.diff(owners, prepend=-1)[owners < num_documents])
        if changes != np.count_nonzero(lengths):
            raise ValueError("DocumentLayout: a document's chunks must be consecutive in chunk_documents.")
        return cls(
            chunk_documents=jnp.asarray(owners, jnp.int32),
            starts=jnp.asarray(starts),
            lengths=jnp.asarray(lengths),
            max_length=int(lengths.max(initial=1)),
        )


@struct.dataclass
class ChunkStates:
    """What a router layer pools from its documents, float32, before any normalisation (paper eq. 1).

    Attributes:
      routing_key: [..., C, K, D], mean of `h W_KR`.
      content_k: [..., C, K, D], mean of the keys after k-norm and RoPE.
      content_v: [..., C, K, D], mean of the values.
    """

    routing_key: jax.Array
    content_k: jax.Array
    content_v: jax.Array

    def arrays(self, routing_key: Callable[[jax.Array], jax.Array], dtype) -> dict[str, jax.Array]:
        """What a memory holds of them, in `dtype`: fields of a `LayerMemory`, or of a `MemoryBank` if stacked.

        `routing_key`: makes the keys [..., C, M] that are searched of pooled ones.
        """
        keys = routing_key(self.routing_key)
        arrays = dict(routing_keys=keys, content_k=self.content_k, content_v=self.content_v)
        return {name: x.astype(dtype) for name, x in arrays.items()}


@struct.dataclass
class StoredContent:
    """Content that stays on disk; `msa_jax.memory.tiers.stored` makes it of a reader.

    Attributes:
      number: scalar int32, which of this process's readers. A leaf, so that what is compiled serves other banks.
      source: what is known of the content before it is read: shape [L_r, C, K, D], dtype, and the reader kept alive.
    """

    number: jax.Array
    source: ContentSource = struct.field(pytree_node=False)


class ContentSource:
    """A reader and the form of what it reads. Two of one form are equal: one program reads from either."""

    def __init__(self, reader: object, shape: tuple[int, int, int, int], dtype):
        self.reader, self.shape, self.dtype = reader, tuple(shape), jnp.dtype(dtype)

    def __eq__(self, other):
        return isinstance(other, ContentSource) and (self.shape, self.dtype) == (other.shape, other.dtype)

    def __hash__(self):
        return hash((self.shape, self.dtype))


class _Tiered:
    """What a bank and a layer's view of it have in common: where the content K, V lies."""

    @property
    def tier(self) -> str:
        """Where content is: "device", "host" (arrays in pinned host memory), or "disk"."""
        if self.stored is not None:
            return "disk"
        return "host" if jax.typeof(self.content_k).memory_space == jax.memory.Space.Host else "device"


@struct.dataclass
class LayerMemory(_Tiered):
    """One router layer's view of the bank.

    Attributes:
      routing_keys: [C, M], L2-normalised per key/value head (raw under `routing_score="dot"`); float or int8. None
        in what `msa_jax.memory.tiers.fetch` gives, which is read with its own selection.
      content_k, content_v: [C, K, D]; float or int8. None with `stored`.
      layout: which chunks belong to which document.
      index: scalar int32: the arrays are [L_r, ...] and this is the layer to read, where it lies. None: they are
        the layer's own.
      key_scale: [C] float32 with int8 routing keys: a key is `routing_keys[c] * key_scale[c]`. Else None.
      content_k_scale, content_v_scale: [K, C] float32 with int8 content: `content_k[c, h] * content_k_scale[h, c]`.
      stored: content on disk; needs `index`.
    """

    routing_keys: jax.Array | None
    content_k: jax.Array | None
    content_v: jax.Array | None
    layout: DocumentLayout
    index: jax.Array | None = None
    key_scale: jax.Array | None = None
    content_k_scale: jax.Array | None = None
    content_v_scale: jax.Array | None = None
    stored: StoredContent | None = None

    def check(self) -> None:
        """Refuse arrays that do not fit together.

        Raises:
          ValueError: says which array, and what it must be.
        """
        _check(self, stacked=self.index is not None)


@struct.dataclass
class MemoryBank(_Tiered):
    """All router layers' memory, stacked; the layout is shared.

    Routing keys, scales and layout are on the device always; content may be in host memory (arrays whose sharding
    has the memory kind "pinned_host") or on disk, and then no gradient reaches it.

    Attributes:
      routing_keys: [L_r, C, M], float or int8; None in what `msa_jax.memory.tiers.fetch` gives.
      content_k, content_v: [L_r, C, K, D], float or int8; None with `stored`.
      layout: which chunks belong to which document.
      key_scale: [L_r, C] float32 with int8 routing keys, else None.
      content_k_scale, content_v_scale: [L_r, K, C] float32 with int8 content, else None.
      stored: content on disk.
    """

    routing_keys: jax.Array | None
    content_k: jax.Array | None
    content_v: jax.Array | None
    layout: DocumentLayout
    key_scale: jax.Array | None = None
    content_k_scale: jax.Array | None = None
    content_v_scale: jax.Array | None = None
    stored: StoredContent | None = None

    @property
    def num_documents(self) -> int:
        return self.layout.num_documents

    @property
    def num_chunks(self) -> int:
        return self.layout.num_chunks

    @property
    def num_layers(self) -> int:
        return (self.stored.source if self.stored else self.content_k).shape[0]

    @property
    def arrays(self) -> dict[str, jax.Array | None]:
        """What is stacked by layer, by name: fields of a `LayerMemory`."""
        return {name: getattr(self, name) for name in LAYER_ARRAYS}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, in device or host memory."""
        return sum(x.nbytes for x in self.arrays.values() if x is not None)

    def layer(self, index: int) -> LayerMemory:
        """Memory of the `index`-th router layer: its own arrays, or with content off the device all layers'."""
        if self.tier != "device":
            return self.layer_at(jnp.int32(index))
        return LayerMemory(**jax.tree.map(lambda x: x[index], self.arrays), layout=self.layout)

    def layer_at(self, index: jax.Array) -> LayerMemory:
        """Memory of the `index`-th router layer, a scalar int32 that may be traced: nothing is copied."""
        return LayerMemory(**self.arrays, layout=self.layout, index=index, stored=self.stored)

    def check(self) -> None:
        """Refuse arrays that do not fit together.

        Raises:
          ValueError: says which array, and what it must be.
        """
        _check(self, stacked=True)


LAYER_ARRAYS = ("routing_keys", "content_k", "content_v", "key_scale", "content_k_scale", "content_v_scale")


def _check(memory: LayerMemory | MemoryBank, *, stacked: bool) -> None:
    name, chunks, stored = type(memory).__name__, memory.layout.num_chunks, memory.stored
    arrays = (memory.content_k, memory.content_v)
    if any((x is None) != (stored is not None) for x in arrays) or (stored is not None and not stacked):
        raise ValueError(
            f"{name}: content_k and content_v, or `stored` and neither of them (and in a LayerMemory `index`), must "
            "be given."
        )
    k, v = (stored.source, stored.source) if stored else arrays
    kv_heads, head_dim = k.shape[-2:]
    first = k if memory.routing_keys is None else memory.routing_keys
    layers, prefix = (first.shape[:1], "L_r, ") if stacked else ((), "")

    def need(what, x, dims, *shape):
        if x.shape != (*layers, *shape):
            raise ValueError(f"{name}: {what} must be [{prefix}{dims}] = {(*layers, *shape)}, got {x.shape}.")

    need("content_k", k, "C, K, D", chunks, kv_heads, head_dim)
    need("content_v", v, "C, K, D", chunks, kv_heads, head_dim)
    if memory.routing_keys is not None:
        need("routing_keys", memory.routing_keys, "C, M", chunks, memory.routing_keys.shape[-1])
    for what, values, dims, shape in (
        ("routing_keys", memory.routing_keys, "C", (chunks,)),
        ("content_k", k, "K, C", (kv_heads, chunks)),
        ("content_v", v, "K, C", (kv_heads, chunks)),
    ):
        scale_name = "key_scale" if what == "routing_keys" else f"{what}_scale"
        scale = getattr(memory, scale_name)
        if (values is not None and values.dtype == jnp.int8) != (scale is not None):
            raise ValueError(
                f"{name}: {what} of {values.dtype} {'without' if scale is None else 'with'} {scale_name}: int8 needs "
                "a scale, and only int8 has one (`msa_jax.bank.quantization` makes both)."
            )
        if scale is not None:
            need(scale_name, scale, dims, *shape)
