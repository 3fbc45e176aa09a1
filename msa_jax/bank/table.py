"""The documents of a bank: what is kept of each, and the index that finds one by id or by text."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

# Columns of the array `documents` [N, 10] int64: chunks [START, START + LENGTH), tokens, which namespace, 1 or 0, two
# halves each of the keys of id and text (`key_of`), and the number by which the model names the text.
START, LENGTH, TOKENS, NAMESPACE, ALIVE, ID_KEY, _, TEXT_KEY, _, NUMBER = range(10)
COLUMNS = 10
# What documents of one text have in common.
PLACE = [START, LENGTH, TOKENS, NUMBER]
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
    """Rows by the value of a column: sorted once, with a dictionary of rows that came since."""

    def __init__(self, columns: np.ndarray, column: int):
        # Stable, so that rows of one value stay in order.
        self._order = np.argsort(columns[:, column], kind="stable")
        self._sorted = columns[self._order, column]
        self._recent: dict[int, list[int]] = {}

    def add(self, value: int, row: int) -> None:
        self._recent.setdefault(value, []).append(row)

    def rows(self, value: int) -> list[int]:
        """In order, dead ones too."""
        first, last = np.searchsorted(self._sorted, value, "left"), np.searchsorted(self._sorted, value, "right")
        return [*self._order[first:last].tolist(), *self._recent.get(value, ())]


class Table:
    """All rows of one version: numbers only, 80 bytes and three entries of an index a document.

    One thread may look things up while another extends it: it finds what was there, and perhaps what is new.

    Attributes:
      columns: [N, 10] int64.
      namespaces: their names.
    """

    def __init__(self, namespaces: Sequence[str], columns: np.ndarray):
        self.namespaces = list(namespaces)
        self.columns = columns
        self._sort()

    def _sort(self) -> None:
        self._ids, self._texts, self._numbers = (_Index(self.columns, c) for c in (ID_KEY, TEXT_KEY, NUMBER))
        self._unsorted = 0

    def extend(self, columns: np.ndarray) -> None:
        """Add rows [n, 10]."""
        first = len(self.columns)
        self.columns = np.concatenate([self.columns, columns])
        self._unsorted += len(columns)
        if self._unsorted > _RECENT:
            self._sort()
            return
        for row, values in enumerate(columns.tolist(), start=first):
            self._ids.add(values[ID_KEY], row)
            self._texts.add(values[TEXT_KEY], row)
            self._numbers.add(values[NUMBER], row)

    def bury(self, rows: Sequence[int]) -> None:
        """Mark rows as deleted."""
        self.columns[list(rows), ALIVE] = 0

    def row_of(self, key: Key) -> int | None:
        """Row of the live document with that `id_key`."""
        return self._first(self._ids, ID_KEY, key)

    def row_with(self, key: Key) -> int | None:
        """Row of the first live document with that `text_key`."""
        return self._first(self._texts, TEXT_KEY, key)

    def rows_numbered(self, number: int, namespaces: Collection[int] | None = None) -> list[int]:
        """Live rows of the text that has a number, ascending: several when documents share it; none when no text has.

        Args:
          namespaces: only of these, by number; None means all.
        """
        if not 0 < number < 1 << 63:
            return []
        rows = [row for row in self._numbers.rows(number) if self.columns[row, ALIVE]]
        return [row for row in rows if namespaces is None or int(self.columns[row, NAMESPACE]) in namespaces]

    def _first(self, index: _Index, column: int, key: Key) -> int | None:
        """The first live row of a key; its first half is what the index knows."""
        for row in index.rows(key[0]):
            if self.columns[row, ALIVE] and tuple(self.columns[row, column : column + 2].tolist()) == key:
                return row
        return None

    @property
    def alive(self) -> np.ndarray:
        """Rows of live documents, ascending."""
        return np.flatnonzero(self.columns[:, ALIVE])
