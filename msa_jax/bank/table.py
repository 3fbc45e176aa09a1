"""The documents of a bank: what is kept of each, and the index that finds one by id or by text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msa_jax.bank.database import Database

# Columns of the array `documents` [N, 5] int64.
START, LENGTH, TOKENS, NAMESPACE, ALIVE = range(5)
COLUMNS = 5
DEFAULT_NAMESPACE = "default"


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

    @property
    def digest(self) -> str:
        """Of the text: equal texts of a namespace are encoded once."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def text_key(row: int) -> str:
    return f"text/{row:012d}"


def rows_key(first: int) -> str:
    return f"rows/{first:012d}"


def pack_rows(documents: Sequence[BankDocument]) -> bytes:
    """Ids, titles and digests of consecutive rows: what the index needs, without the texts."""
    return zlib.compress(json.dumps([[d.id, d.title, d.digest] for d in documents]).encode(), 1)


def pack_text(document: BankDocument) -> bytes:
    return zlib.compress(json.dumps({"text": document.text, "metadata": dict(document.metadata)}).encode(), 1)


def unpack(raw: bytes) -> Any:
    """What `pack_rows` or `pack_text` wrote. Raises ValueError when it is damaged."""
    try:
        return json.loads(zlib.decompress(raw))
    except zlib.error as e:
        raise ValueError(str(e)) from e


class Table:
    """All rows of one version, in memory but for the texts.

    Attributes:
      columns: [N, 5] int64.
      ids, titles, digests: N strings each.
      namespaces: their names.
    """

    def __init__(self, namespaces: Sequence[str]):
        self.namespaces = list(namespaces)
        self.columns = np.zeros((0, COLUMNS), np.int64)
        self.ids: list[str] = []
        self.titles: list[str] = []
        self.digests: list[str] = []
        self._by_id: dict[tuple[int, str], int] = {}
        self._by_digest: dict[tuple[int, str], int] = {}

    @classmethod
    def read(cls, database: Database, namespaces: Sequence[str]) -> Table:
        table = cls(namespaces)
        columns = np.asarray(database.array("documents").read().result())
        rows: list[list[str]] = []
        for raw in database.read_many(database.keys("rows/")):
            rows += unpack(raw)
        if len(rows) != len(columns):
            raise ValueError(f"{len(columns)} documents have {len(rows)} ids")
        table.extend(columns, rows)
        return table

    def extend(self, columns: np.ndarray, rows: Sequence[Sequence[str]]) -> None:
        """Add rows [n, 5] with their [id, title, digest]."""
        first = len(self.ids)
        self.columns = np.concatenate([self.columns, columns])
        for row, (identity, title, digest) in enumerate(rows, start=first):
            self.ids.append(identity)
            self.titles.append(title)
            self.digests.append(digest)
            if self.columns[row, ALIVE]:
                namespace = int(self.columns[row, NAMESPACE])
                self._by_id[namespace, identity] = row
                self._by_digest.setdefault((namespace, digest), row)

    def bury(self, rows: Sequence[int]) -> None:
        """Mark rows as deleted."""
        for row in rows:
            self.columns[row, ALIVE] = 0
            namespace = int(self.columns[row, NAMESPACE])
            del self._by_id[namespace, self.ids[row]]
            self._by_digest.pop((namespace, self.digests[row]), None)
        # A text that others still hold keeps its place in the index.
        buried = {(int(self.columns[row, NAMESPACE]), self.digests[row]) for row in rows}
        if buried:
            for row in np.flatnonzero(self.columns[:, ALIVE]):
                key = int(self.columns[row, NAMESPACE]), self.digests[row]
                if key in buried:
                    self._by_digest.setdefault(key, int(row))

    def number_of(self, namespace: str) -> int | None:
        return self.namespaces.index(namespace) if namespace in self.namespaces else None

    def row_of(self, namespace: str, identity: str) -> int | None:
        """Row of a live document."""
        return self._by_id.get((self.number_of(namespace), identity))

    def row_with(self, namespace: str, digest: str) -> int | None:
        """Row of a live document with a text of that digest."""
        return self._by_digest.get((self.number_of(namespace), digest))

    @property
    def alive(self) -> np.ndarray:
        """Rows of live documents, ascending."""
        return np.flatnonzero(self.columns[:, ALIVE])
