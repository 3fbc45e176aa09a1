"""A bank that grows document by document, so that memories of several sizes are the beginnings of one.

Sizes: C chunks, N documents, L_r router layers, K key/value heads, D head dim, M = K * D.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from msa_jax.bank.capacity import capacity_for
from msa_jax.bank.encoder import RowEncoder
from msa_jax.bank.quantization import quantize_content, quantize_keys
from msa_jax.data import Document, Renderer, pack_documents
from msa_jax.memory import DocumentLayout, MemoryBank
from msa_jax.model import MSATransformer


class GrowingBank:
    """Documents encoded so far, as arrays on the host.

    Attributes:
      documents: by number, in the order of the bank.
      tokens: rendered, of all of them.
    """

    def __init__(self, model: MSATransformer, renderer: Renderer, row_len: int, *, int8: bool = False):
        """`row_len`: W of packed rows. `int8`: keep keys and content quantised, for banks of 100M tokens."""
        self._encoder, self._renderer, self._row_len, self._int8 = RowEncoder(model), renderer, row_len, int8
        self._chunk_size = model.config.chunk_size
        self._pieces: list[list[np.ndarray]] = []
        self._lengths: list[np.ndarray] = []
        self.documents: dict[int, Document] = {}
        self.tokens = 0

    def add(self, documents: Sequence[Document], numbers: Sequence[int], *, rows_per_step: int = 128) -> None:
        """Encode documents behind those that are there."""
        rendered = [self._renderer.render_document(d, n) for d, n in zip(documents, numbers, strict=True)]
        packed = pack_documents(
            rendered, chunk_size=self._chunk_size, row_len=self._row_len, pad_id=self._renderer.tokenizer.pad_id
        )
        used = packed.chunk_documents < len(documents)
        arrays = self._encoder.arrays(int(used.sum()))
        place = np.where(used, np.cumsum(used) - 1, -1)
        self._encoder.encode(packed, arrays, place, rows_per_step=rows_per_step)
        if self._int8:
            pairs = [quantize_keys(arrays[0]), *map(quantize_content, arrays[1:])]
            arrays = [values for values, _ in pairs] + [scale for _, scale in pairs]
        self._pieces.append(list(arrays))
        self._lengths.append(packed.lengths)
        self.documents.update(zip(numbers, documents, strict=True))
        self.tokens += sum(map(len, rendered))

    def bank(self, capacity_tokens: int) -> MemoryBank:
        """The bank as it is, padded to shapes that all memories of so many tokens share: compiled once for all."""
        chunks = capacity_for(max(capacity_tokens // (self._chunk_size - 4), sum(map(int, map(np.sum, self._lengths)))))
        documents = capacity_for(max(capacity_tokens // 40, len(self.documents)))
        axes = [1, 1, 1] + [1, 2, 2] * self._int8  # of chunks
        arrays = [self._joined(i, axis, chunks) for i, axis in enumerate(axes)]
        lengths = np.zeros(documents, np.int32)
        lengths[: len(self.documents)] = np.concatenate(self._lengths)
        owners = np.full(chunks, documents, np.int32)
        owners[: lengths.sum()] = np.repeat(np.arange(documents), lengths)
        layout = DocumentLayout(
            chunk_documents=jnp.asarray(owners),
            starts=jnp.asarray(np.where(lengths > 0, np.cumsum(lengths) - lengths, 0), jnp.int32),
            lengths=jnp.asarray(lengths),
            max_length=self._row_len // self._chunk_size,
        )
        names = ("key_scale", "content_k_scale", "content_v_scale")
        return MemoryBank(*arrays[:3], layout, **dict(zip(names, arrays[3:], strict=False)))

    def _joined(self, index: int, axis: int, size: int) -> jnp.ndarray:
        first = self._pieces[0][index]
        whole = np.zeros((*first.shape[:axis], size, *first.shape[axis + 1 :]), first.dtype)
        begin = 0
        for piece in self._pieces:
            end = begin + piece[index].shape[axis]
            whole[(slice(None),) * axis + (slice(begin, end),)] = piece[index]
            begin = end
        return jnp.asarray(whole)
