"""Stage 1 over a corpus: packed rows through one jit-compiled step of fixed shape, into a memory bank.

Sizes: R rows, W row length, P tokens a chunk, C chunks, N documents, L_r router layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from msa_jax.data.batch import DocumentBatch
from msa_jax.memory import ChunkStates, DocumentLayout, MemoryBank
from msa_jax.model import MSATransformer


@functools.partial(jax.jit, static_argnames="graphdef")
def _encode_rows(graphdef, params, tokens, segment_ids, positions):
    model = nnx.merge(graphdef, params)
    states = model.encode_documents(tokens, segment_ids=segment_ids, positions=positions).states
    empty = jnp.full((tokens.size // model.config.chunk_size,), 0, jnp.int32)
    layout = DocumentLayout(chunk_documents=empty, starts=empty, lengths=empty, max_length=1)
    bank = model.bank(states, layout)
    return ChunkStates(routing_key=bank.routing_keys, content_k=bank.content_k, content_v=bank.content_v)


class RowEncoder:
    """A model's encode step on all devices of this process, each with its own rows and all parameters."""

    def __init__(self, model: MSATransformer):
        self.config = model.config
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("rows",))
        self._by_row = jax.sharding.NamedSharding(mesh, jax.P("rows"))
        self._graphdef, params = nnx.split(model)
        self._params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.P()))

    def arrays(self, chunks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Zeros on the host for `chunks` chunks: routing keys [L_r, C, M], content k and v [L_r, C, K, D]."""
        c = self.config
        shape = (len(c.router_layers), chunks)
        content = (*shape, c.num_kv_heads, c.head_dim)
        return tuple(np.zeros(s, c.compute_dtype) for s in ((*shape, c.router_width), content, content))

    def encode(
        self,
        documents: DocumentBatch,
        targets: tuple[np.ndarray, np.ndarray, np.ndarray],
        place: np.ndarray,
        *,
        rows_per_step: int,
        progress: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        """Encode packed rows into host arrays. While a step computes, the results of the one before are fetched.

        Args:
          documents: [R, W] packed rows, host arrays.
          targets: as of `arrays`.
          place: where in them the C chunks of `documents` go, -1 for those of no document.
          rows_per_step: rounded up to a multiple of the number of devices.
          progress: called with the number of tokens of each step that is done.
        """
        devices = self._by_row.mesh.size
        step = -(-rows_per_step // devices) * devices
        rows, width = documents.tokens.shape
        per_row = width // self.config.chunk_size

        def store(first, states):
            where = place[first * per_row : (first + step) * per_row]
            used = np.flatnonzero(where >= 0)
            for target, value in zip(targets, states, strict=True):
                target[:, where[used]] = jax.device_get(value)[:, used]
            progress(int((documents.segment_ids[first : first + step] > 0).sum()))

        running = None
        for first in range(0, rows, step):
            arrays = (documents.tokens, documents.segment_ids, documents.positions)
            parts = [a[first : first + step] for a in arrays]
            padded = [np.pad(a, ((0, step - len(a)), (0, 0))) for a in parts]
            out = _encode_rows(self._graphdef, self._params, *jax.device_put(padded, self._by_row))
            if running is not None:
                store(*running)
            running = first, (out.routing_key, out.content_k, out.content_v)
        if running is not None:
            store(*running)


def encode_bank(
    model: MSATransformer, documents: DocumentBatch, *, rows_per_step: int = 64, progress: bool = False
) -> MemoryBank:
    """Encode packed documents into a bank in the model's compute dtype.

    The result does not depend on `rows_per_step` or on how documents were packed, beyond rounding.

    Args:
      model: whose parameters encode.
      documents: [R, W] packed rows (host arrays) of any number of documents.
      rows_per_step: rows that pass the model at once, over all devices of this process; sets the memory of
        activations.
      progress: show a progress bar of tokens.

    Returns:
      Bank of the chunks in use: C is their number, in the order of `documents.chunk_documents`.

    Raises:
      ValueError: W is no multiple of the model's chunk size, or the layout was made for another one.
    """
    rows, width = documents.tokens.shape
    chunk = model.config.chunk_size
    if width % chunk or rows * width != len(documents.chunk_documents) * chunk:
        raise ValueError(
            f"encode_bank: rows of {width} tokens with {len(documents.chunk_documents)} chunks were not packed for "
            f"this model's chunk size {chunk}; pack them with it."
        )
    used = documents.chunk_documents < len(documents.starts)
    # Positions of the used chunks in the result, so that padding leaves no trace in the bank.
    place = np.cumsum(used) - 1
    encoder = RowEncoder(model)
    targets = encoder.arrays(int(used.sum()))
    total = int((documents.segment_ids > 0).sum())
    with tqdm(total=total, desc="encode", unit="tok", unit_scale=True, mininterval=1.0, disable=not progress) as bar:
        encoder.encode(documents, targets, np.where(used, place, -1), rows_per_step=rows_per_step, progress=bar.update)
    layout = DocumentLayout.from_chunk_documents(documents.chunk_documents[used], len(documents.starts))
    return MemoryBank(*map(jnp.asarray, targets), layout)
