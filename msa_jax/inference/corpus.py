"""What is asked: a bank, and the original texts of its documents, by the numbers that the model names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from msa_jax.bank import load
from msa_jax.bank.reader import BankReader
from msa_jax.bank.table import DEFAULT_NAMESPACE, NUMBER, BankDocument
from msa_jax.data.records import Document
from msa_jax.errors import QuestionError
from msa_jax.inference.slots import Visibility
from msa_jax.memory import MemoryBank

# Namespaces are counted up to a multiple of this, so that a new one seldom changes a shape.
_NAMESPACES = 64


@dataclasses.dataclass(frozen=True)
class View:
    """What one question may see: namespaces `allowed` [A] bool, and what had come when it began.

    That is told by `seen`, as in `Visibility`, and by how many rows the table of the bank on disk had.
    """

    allowed: np.ndarray
    seen: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Original:
    """A document as it is read: its text, or tokens made of it ahead of time."""

    document: Document
    namespace: str = DEFAULT_NAMESPACE


class Corpus(Protocol):
    """What an engine asks.

    Attributes:
      bank: None for no memory.
      visibility: whose the documents of the bank are; None without a bank.
      names: of the namespaces.
      len: documents that can be read.
    """

    bank: MemoryBank | None
    visibility: Visibility | None
    names: tuple[str, ...]

    def __len__(self) -> int: ...

    def view(self, namespaces: Sequence[str] | None) -> View:
        """What a question of these namespaces may see, None all, from now on. Raises QuestionError."""

    def find(self, number: int, view: View) -> Original | None:
        """The document of a number, if there is one that the question may see."""

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Numbers of the documents at `places` of the bank, int64, -1 where there is none."""


class FixedCorpus:
    """A bank in memory and its documents, all of one namespace."""

    names = (DEFAULT_NAMESPACE,)

    def __init__(self, bank: MemoryBank | None, documents: Mapping[int, Document]):
        """Make one.

        Args:
          bank: the n-th document of it is the n-th of `documents`.
          documents: by number.

        Raises:
          ValueError: more documents than the bank has, or fewer.
        """
        places = np.full(bank.num_documents if bank else len(documents), -1, np.int64)
        there = np.flatnonzero(np.asarray(bank.layout.lengths)) if bank else np.arange(len(places))
        if len(there) != len(documents):
            raise ValueError(
                f"Session: the bank has {len(there)} documents and `documents` {len(documents)}: give each document's "
                "number and text, in the order in which they were encoded."
            )
        places[there] = list(documents)
        self.bank, self._documents, self._numbers = bank, documents, places
        self.visibility = None
        if bank is not None:
            nobody = (places < 0).astype(np.int32)
            self.visibility = Visibility(namespaces=jnp.asarray(nobody), born=jnp.zeros(len(places), jnp.int32))

    def __len__(self) -> int:
        return len(self._documents)

    def view(self, namespaces: Sequence[str] | None) -> View:
        unknown = sorted(set(namespaces or ()) - {DEFAULT_NAMESPACE})
        if unknown:
            raise QuestionError(f"no namespace {unknown[0]!r} in this bank: it has {DEFAULT_NAMESPACE}.")
        return View(np.array([namespaces is None or len(namespaces) > 0]))

    def find(self, number: int, view: View) -> Original | None:
        document = self._documents.get(number) if view.allowed[0] else None
        return document and Original(document)

    def numbers(self, places: np.ndarray) -> np.ndarray:
        return self._numbers[places]


class StoredCorpus:
    """The documents of a bank on disk, as of the last `follow`. See `Corpus`.

    Attributes:
      bank, visibility: on the device.
      version: of the bank.
    """

    def __init__(self, path: str, **options: Any):
        """Load the bank at `path`; `options` are those of `msa_jax.bank.load`. Raises BankError."""
        self._path, self._reader = path, BankReader(path)
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
        columns = -(-max(1, len(loaded.names)) // _NAMESPACES) * _NAMESPACES
        whose = np.where(loaded.namespaces < 0, columns, loaded.namespaces)
        self.visibility = Visibility(
            namespaces=jnp.asarray(whose, jnp.int32), born=jnp.asarray(self._born, jnp.int32)
        )
        # Rows are added behind others: how many there are tells what had come. One value, which other threads read.
        self._now = (loaded.names, columns, self._epoch, len(self._reader.table.columns))

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the namespaces."""
        return self._now[0]

    def follow(self, *, idle: bool) -> bool:
        """Go to the newest version of the bank.

        Args:
          idle: no question is in progress, so that documents may change places on the device.

        Returns:
          False if they would have to, and questions are in progress: nothing was changed then.

        Raises:
          BankError: a bank that cannot be read; what was loaded stays.
        """
        # Questions in progress go on to read by the tables of what is loaded, unless this succeeds.
        newest = BankReader(self._path)
        try:
            before = self._loaded.placement
            after = before.follow(newest)
            # For content off the device there is room for the longest document so far.
            stays = after is not None and (self.bank.tier == "device" or after.max_length == before.max_length)
            if after is not before and (stays or idle):
                self._loaded = self._loaded.refresh(newest)
        except BaseException:
            newest.close()
            raise
        if after is before or not (stays or idle):
            newest.close()
            return after is before
        self._reader, reader = newest, self._reader
        reader.close()
        before, rows = before.rows, self._loaded.rows
        self._epoch += 1
        if not stays:
            self._born = np.zeros(len(rows), np.int32)
        else:
            self._born[(before < 0) & (rows >= 0)] = self._epoch
        self._see()
        return True

    def view(self, namespaces: Sequence[str] | None) -> View:
        names, columns, epoch, rows = self._now
        unknown = sorted(set(namespaces or ()) - set(names))
        if unknown:
            raise QuestionError(f"no namespace {unknown[0]!r} in this bank: it has {', '.join(names)}.")
        allowed = np.zeros(columns, bool)
        allowed[[i for i, name in enumerate(names) if namespaces is None or name in namespaces]] = True
        return View(allowed, epoch, rows)

    def find(self, number: int, view: View) -> Original | None:
        rows = self._reader.table.rows_numbered(number, set(np.flatnonzero(view.allowed).tolist()))
        rows = [row for row in rows if row < view.rows and self._loaded.placement.includes(row)]
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
