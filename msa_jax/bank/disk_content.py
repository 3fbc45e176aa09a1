"""Content that stays in the bank on disk: the reader that `msa_jax.memory.tiers` calls for what a question selected."""

from __future__ import annotations

import numpy as np

from msa_jax.bank.database import refusing
from msa_jax.bank.reader import BankReader
from msa_jax.memory import StoredContent, tiers


class DiskContent:
    """Reads content of one version of a bank, chunk by chunk; closing the bank or changing it does not disturb it.

    Args:
      store: an open bank.
      source: [C] int64, which chunk on disk each chunk of the loaded bank is; what is negative is never asked for.
    """

    def __init__(self, store: BankReader, source: np.ndarray):
        self._where, self._source = str(store.path), np.asarray(source, np.int64)
        self._arrays = tuple(store.array(name) for name in ("content_k", "content_v"))

    def read(self, layer: int, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Content k and v [n, K, D] of `chunks` [n] of a router layer.

        Raises:
          BankError: the disk fails, or what it holds is damaged; the bank is named.
        """
        with refusing(self._where):
            pending = [array[layer, self._source[chunks]].read() for array in self._arrays]
            return tuple(read.result() for read in pending)

    def stored(self) -> StoredContent:
        """What a `MemoryBank` without content arrays has in their place."""
        array = self._arrays[0]
        layers, _, *rest = array.shape
        return tiers.stored(self, (layers, len(self._source), *rest), array.dtype.numpy_dtype)
