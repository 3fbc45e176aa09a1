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
      routing_keys: [C, M], L2-normalised per key/value head (raw under `routing_score="dot"`).
      content_k, content_v: [C, K, D].
      layout: which chunks belong to which document.
      index: scalar int32: the arrays are [L_r, ...] and this is the layer to read, where it lies. None: they are
        the layer's own.
    """

    routing_keys: jax.Array
    content_k: jax.Array
    content_v: jax.Array
    layout: DocumentLayout
    index: jax.Array | None = None


@struct.dataclass
class MemoryBank:
    """All router layers' memory, stacked; the layout is shared.

    Attributes:
      routing_keys: [L_r, C, M].
      content_k, content_v: [L_r, C, K, D].
      layout: which chunks belong to which document.
    """

    routing_keys: jax.Array
    content_k: jax.Array
    content_v: jax.Array
    layout: DocumentLayout

    @property
    def num_documents(self) -> int:
        return self.layout.num_documents

    @property
    def num_chunks(self) -> int:
        return self.layout.num_chunks

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.routing_keys, self.content_k, self.content_v))

    def layer(self, index: int) -> LayerMemory:
        """Memory of the `index`-th router layer."""
        return LayerMemory(
            routing_keys=self.routing_keys[index],
            content_k=self.content_k[index],
            content_v=self.content_v[index],
            layout=self.layout,
        )
