"""The documents of a bank: what is kept of each, and the index that finds one by id or by text."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Columns of the array `documents` [N, 9] int64: chunks [START, START + LENGTH), tokens, number of the namespace, 1 or
# 0, and two halves each of the keys of id and text (`key_of`).
START, LENGTH, TOKENS, NAMESPACE, ALIVE, ID_KEY, _, TEXT_KEY, _ = range(9)
COLUMNS = 9
DEFAULT_NAMESPACE = "default"
# New rows are found by a dictionary until there are this many; then all rows are sorted anew.
_RECENT = 1 << 15

Key = tuple[int, int]


def key_of(namespace: str, value: str) -> Key:
    """128 bits that stand for a string within its namespace, as two signed numbers."""
    digest = hashlib.blake2b(f"{len(namespace)}:{namespace}{value}".encode(), digest_size=16).digest()
    high, low = np.frombuffer(digest, "<i8").tolist()
    return high, low


@dataclasses.dataclass(frozen=True)
class BankDocument:
    """A document as it goes into a bank and comes out of it.

    Attributes:
      id: its identity within its namespace.
      text: what is encoded, and what a reader is shown.
      title: for citations.
      namespace: who may read it: a question names namespaces.
      metadata: any JSON object of the user's.
    """

    id: str
    text: str
    title: str = ""
    namespace: str = DEFAULT_NAMESPACE
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def id_key(self) -> Key:
        return key_of(self.namespace, self.id)

    @functools.cached_property
    def text_key(self) -> Key:
        """Equal texts of a namespace are encoded once."""
        return key_of(self.namespace, self.text)


def body_key(row: int) -> str:
    """Database key of what `pack_body` made of a row."""
    return f"body/{row:012d}"


def names_key(first: int) -> str:
    """Database key of the names of consecutive rows from `first` on."""
    return f"names/{first:012d}"


def pack(value: Any) -> bytes:
    return zlib.compress(json.dumps(value, ensure_ascii=False).encode(), 1)


def pack_body(document: BankDocument) -> bytes:
    return pack([document.id, document.title, document.text, dict(document.metadata)])


def unpack(raw: bytes) -> Any:
    """What `pack` wrote. Raises ValueError when it is damaged."""
    try:
        return json.loads(zlib.decompress(raw))
    except zlib.error as e:
        raise ValueError(str(e)) from e


class _Index:
    """Rows by a 128-bit key: sorted once, with a dictionary of rows that came since."""

    def __init__(self, columns: np.ndarray, column: int):
        self._column = column
        # Stable, so that rows of one key stay in order.
        self._order = np.argsort(columns[:, column], kind="stable")
        self._sorted = columns[self._order, column]
        self._recent: dict[Key, list[int]] = {}

    def add(self, key: Key, row: int) -> None:
        self._recent.setdefault(key, []).append(row)

    def find(self, columns: np.ndarray, key: Key) -> int | None:
        """The first live row of a key."""
        first, last = np.searchsorted(self._sorted, key[0], "left"), np.searchsorted(self._sorted, key[0], "right")
        rows = [*self._order[first:last].tolist(), *self._recent.get(key, ())]
        for row in rows:
            if columns[row, ALIVE] and tuple(columns[row, self._column : self._column + 2].tolist()) == key:
                return row
        return None


class Table:
    """All rows of one version: numbers only, 72 bytes and two entries of an index a document.

    One thread may look things up while another extends it: it finds what was there, and perhaps what is new.

    Attributes:
      columns: [N, 9] int64.
      namespaces: their names.
    """

    def __init__(self, namespaces: Sequence[str], columns: np.ndarray):
        self.namespaces = list(namespaces)
        self.columns = columns
        self._sort()

    def _sort(self) -> None:
        self._ids, self._texts = _Index(self.columns, ID_KEY), _Index(self.columns, TEXT_KEY)
        self._unsorted = 0

    def extend(self, columns: np.ndarray) -> None:
        """Add rows [n, 9]."""
        first = len(self.columns)
        self.columns = np.concatenate([self.columns, columns])
        self._unsorted += len(columns)
        if self._unsorted > _RECENT:
            self._sort()
            return
        for row, values in enumerate(columns.tolist(), start=first):
            self._ids.add(tuple(values[ID_KEY : ID_KEY + 2]), row)
            self._texts.add(tuple(values[TEXT_KEY : TEXT_KEY + 2]), row)

    def bury(self, rows: Sequence[int]) -> None:
        """Mark rows as deleted."""
        self.columns[list(rows), ALIVE] = 0

    def row_of(self, key: Key) -> int | None:
        """Row of the live document with that `id_key`."""
        return self._ids.find(self.columns, key)

    def row_with(self, key: Key) -> int | None:
        """Row of the first live document with that `text_key`."""
        return self._texts.find(self.columns, key)

    @property
    def alive(self) -> np.ndarray:
        """Rows of live documents, ascending."""
        return np.flatnonzero(self.columns[:, ALIVE])
