"""A library on disk: a bank that is loaded onto the device, and follows what is added to and deleted from the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from msa_jax.bank import load
from msa_jax.bank.reader import BankReader
from msa_jax.bank.table import NUMBER, BankDocument
from msa_jax.data.records import Document
from msa_jax.inference.library import Original, QuestionError, View
from msa_jax.inference.rows import Visibility

# Namespaces are counted up to a multiple of this, so that a new one seldom changes a shape.
_NAMESPACES = 64


class StoredLibrary:
    """The documents of a bank on disk, as of the last `follow`. See `Library`.

    Attributes:
      bank, visibility: on the device.
      version: of the bank.
    """

    def __init__(self, path: str, **options: Any):
        """Load the bank at `path`; `options` are those of `msa_jax.bank.load`. Raises BankError."""
        self._reader = BankReader(path)
        try:
            self._loaded = load(self._reader, **options)
        except BaseException:
            self._reader.close()
            raise
        self._born = np.zeros(len(self._loaded.rows), np.int32)
        self._epoch = 0
        self._see()

    def _see(self) -> None:
        loaded = self._loaded
        self.bank, self.version = loaded.bank, loaded.version
        self._columns = -(-max(1, len(loaded.names)) // _NAMESPACES) * _NAMESPACES
        whose = np.where(loaded.namespaces < 0, self._columns, loaded.namespaces)
        self.visibility = Visibility(
            namespaces=jnp.asarray(whose, jnp.int32), born=jnp.asarray(self._born, jnp.int32)
        )
        # Rows are added behind others: how many there are tells what had come.
        self._rows = len(self._reader.table.columns)

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the namespaces."""
        return self._loaded.names

    def follow(self, *, idle: bool) -> bool:
        """Go to the newest version of the bank.

        Args:
          idle: no question is in progress, so that documents may change places on the device.

        Returns:
          False if they would have to, and questions are in progress: nothing was changed then.

        Raises:
          BankError: a bank that cannot be read; what was loaded stays.
        """
        self._reader.refresh()
        if self._reader.version == self._loaded.version:
            return True
        stays = self._loaded.placement.follow(self._reader) is not None
        if not stays and not idle:
            return False
        before = self._loaded.rows
        self._loaded = self._loaded.refresh(self._reader)
        rows = self._loaded.rows
        self._epoch += 1
        if not stays:
            self._born = np.zeros(len(rows), np.int32)
        else:
            self._born[(before < 0) & (rows >= 0)] = self._epoch
        self._see()
        return True

    def view(self, namespaces: Sequence[str] | None) -> View:
        unknown = sorted(set(namespaces or ()) - set(self.names))
        if unknown:
            raise QuestionError(f"no namespace {unknown[0]!r} in this bank: it has {', '.join(self.names)}.")
        allowed = np.zeros(self._columns, bool)
        allowed[[i for i, name in enumerate(self.names) if namespaces is None or name in namespaces]] = True
        return View(allowed, self._epoch, self._rows)

    def find(self, number: int, view: View) -> Original | None:
        rows = self._reader.table.rows_numbered(number, set(np.flatnonzero(view.allowed).tolist()))
        rows = [row for row in rows if row < view.rows]
        if not rows:
            return None
        # Documents of equal text share a number: the first one stands for them.
        found = self._reader.documents(rows[:1])[0]
        return Original(Document(found.id, found.title, found.text), found.namespace)

    def numbers(self, places: np.ndarray) -> np.ndarray:
        rows = self._loaded.rows[places]
        return np.where(rows < 0, -1, self._reader.table.columns[rows, NUMBER])

    def get(self, identity: str, namespace: str) -> BankDocument:
        """The document of an id. Raises KeyError."""
        return self._reader.get(identity, namespace)

    def search(self, prefix: str, namespace: str | None) -> Iterator[tuple[str, str]]:
        """See `BankReader.search`."""
        return self._reader.search(prefix, namespace)

    def close(self) -> None:
        self._loaded.close()
        self._reader.close()
