"""The memory bank as arrays: pytrees that layers read, jit-compiled steps carry, and stores load into.

Sizes: L_r router layers, C chunks, N documents, K key/value heads, D head dim, M = K * D.
"""

from __future__ import annotations

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
    """

    chunk_documents: jax.Array
    starts: jax.Array
    lengths: jax.Array
    max_length: int = struct.field(pytree_node=False)

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


@struct.dataclass
class LayerMemory:
    """One router layer's view of the bank.

    Attributes:
      routing_keys: [C, M], L2-normalised per key/value head (raw under `routing_score="dot"`); float or int8.
      content_k, content_v: [C, K, D]; float or int8.
      layout: which chunks belong to which document.
      index: scalar int32: the arrays are [L_r, ...] and this is the layer to read, where it lies. None: they are
        the layer's own.
      key_scale: [C] float32 with int8 routing keys: a key is `routing_keys[c] * key_scale[c]`. Else None.
      content_k_scale, content_v_scale: [K, C] float32 with int8 content: `content_k[c, h] * content_k_scale[h, c]`.
    """

    routing_keys: jax.Array
    content_k: jax.Array
    content_v: jax.Array
    layout: DocumentLayout
    index: jax.Array | None = None
    key_scale: jax.Array | None = None
    content_k_scale: jax.Array | None = None
    content_v_scale: jax.Array | None = None

    def check(self) -> None:
        """Refuse arrays that do not fit together.

        Raises:
          ValueError: says which array, and what it must be.
        """
        _check(self, stacked=self.index is not None)


@struct.dataclass
class MemoryBank:
    """All router layers' memory, stacked; the layout is shared.

    Attributes:
      routing_keys: [L_r, C, M], float or int8.
      content_k, content_v: [L_r, C, K, D], float or int8.
      layout: which chunks belong to which document.
      key_scale: [L_r, C] float32 with int8 routing keys, else None.
      content_k_scale, content_v_scale: [L_r, K, C] float32 with int8 content, else None.
    """

    routing_keys: jax.Array
    content_k: jax.Array
    content_v: jax.Array
    layout: DocumentLayout
    key_scale: jax.Array | None = None
    content_k_scale: jax.Array | None = None
    content_v_scale: jax.Array | None = None

    @property
    def num_documents(self) -> int:
        return self.layout.num_documents

    @property
    def num_chunks(self) -> int:
        return self.layout.num_chunks

    @property
    def arrays(self) -> dict[str, jax.Array | None]:
        """What is stacked by layer, by name: the fields of a `LayerMemory`."""
        return {name: getattr(self, name) for name in LAYER_ARRAYS}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays.values() if x is not None)

    def layer(self, index: int) -> LayerMemory:
        """Memory of the `index`-th router layer."""
        return LayerMemory(**jax.tree.map(lambda x: x[index], self.arrays), layout=self.layout)

    def check(self) -> None:
        """Refuse arrays that do not fit together.

        Raises:
          ValueError: says which array, and what it must be.
        """
        _check(self, stacked=True)


LAYER_ARRAYS = ("routing_keys", "content_k", "content_v", "key_scale", "content_k_scale", "content_v_scale")


def _check(memory: LayerMemory | MemoryBank, *, stacked: bool) -> None:
    name, keys, content = type(memory).__name__, memory.routing_keys, memory.content_k
    layers = keys.shape[:1] if stacked else ()
    layer, chunks = "L_r, " if stacked else "", memory.layout.num_chunks

    def need(what, x, dims, shape):
        if x.shape != shape:
            raise ValueError(f"{name}: {what} must be [{layer}{dims}] = {shape}, got {x.shape}.")

    need("routing_keys", keys, "C, M", (*layers, chunks, *keys.shape[-1:]))
    need("content_k", content, "C, K, D", (*layers, chunks, *content.shape[-2:]))
    need("content_v", memory.content_v, "C, K, D", content.shape)
    key_scale, scale = (*layers, chunks), (*layers, *content.shape[-2:-1], chunks)
    for what, dims, shape in (
        ("routing_keys", "C", key_scale), ("content_k", "K, C", scale), ("content_v", "K, C", scale)
    ):  # fmt: skip
        scale_name = "key_scale" if what == "routing_keys" else f"{what}_scale"
        values, scales = getattr(memory, what), getattr(memory, scale_name)
        if (values.dtype == jnp.int8) != (scales is not None):
            raise ValueError(
                f"{name}: {what} of {values.dtype} {'with' if scales is not None else 'without'} {scale_name}: int8 "
                f"needs a scale, and only int8 has one (`msa_jax.bank.quantization` makes both)."
            )
        if scales is not None:
            need(scale_name, scales, dims, shape)
