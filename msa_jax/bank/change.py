"""One commit of a bank in the making: chunks and rows are added, rows are buried, the manifest counts them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from msa_jax.bank.database import Database
from msa_jax.bank.manifest import Manifest
from msa_jax.bank.table import (
    ALIVE,
    COLUMNS,
    ID_KEY,
    NAMESPACE,
    PLACE,
    TEXT_KEY,
    TOKENS,
    BankDocument,
    body_key,
    names_key,
    pack,
)

# Bytes of one stored piece of an array: adding a document rewrites the last piece of every layer, and a piece is what
# reading one document reads.
_PIECE_BYTES = 1 << 18
_ROWS_PER_PIECE = 4096


class Encoded(NamedTuple):
    """Chunks of several documents, one after another.

    Attributes:
      routing_keys: [L_r, C, M]; content_k, content_v: [L_r, C, K, D].
      lengths: [n] int64, chunks of each document.
      tokens: [n] int64, tokens of each document, its frame included.
      ordinals: [n] int64, which text of the bank each is, counted from 1; no two texts ever have the same.
      numbers: [n] int64, by which the model names each: what the template makes of its ordinal.
    """

    routing_keys: np.ndarray
    content_k: np.ndarray
    content_v: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    ordinals: np.ndarray
    numbers: np.ndarray


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Change:
    """What one commit changes. Everything is written under `transaction`.

    Attributes:
      database, transaction: for arrays that the commit writes too.
      chunks: C, chunks that will have been written; whoever writes some raises it.
      next_text: as in the manifest; whoever adds texts raises it.
      namespaces: names; rows refer to them by number.
      columns: rows added, [n, 10] each.
      buried: rows deleted.
    """

    def __init__(self, database: Database, transaction: ts.Transaction, manifest: Manifest):
        self.database, self.transaction = database, transaction
        self.chunks, self.next_text = manifest.chunks, manifest.next_text
        self.namespaces = list(manifest.namespaces)
        self.columns: list[np.ndarray] = []
        self.buried: list[int] = []
        self._manifest = manifest
        self._rows, self._documents, self._tokens = manifest.rows, manifest.documents, manifest.tokens

    def columns_of(self, documents: Sequence[BankDocument], places: np.ndarray) -> np.ndarray:
        """Rows [n, 10] of documents whose START, LENGTH, TOKENS and NUMBER are `places` [n, 4]."""
        columns = np.zeros((len(documents), COLUMNS), np.int64)
        columns[:, PLACE], columns[:, ALIVE] = places, 1
        for row, document in zip(columns, documents, strict=True):
            row[NAMESPACE] = self.number_of(document.namespace)
            row[ID_KEY : ID_KEY + 2], row[TEXT_KEY : TEXT_KEY + 2] = document.id_key, document.text_key
        return columns

    def number_of(self, namespace: str) -> int:
        if namespace not in self.namespaces:
            self.namespaces.append(namespace)
        return self.namespaces.index(namespace)

    def add(self, columns: np.ndarray, ids: Sequence[str], bodies: Sequence[bytes]) -> None:
        """Add live rows [n, 10], with their ids and `pack_body`."""
        if not len(columns):
            return
        self.database.put("documents", columns, self._rows, 0, self.transaction)
        self.database.write(names_key(self._rows), pack(list(ids)), self.transaction)
        for row, body in enumerate(bodies, start=self._rows):
            self.database.write(body_key(row), body, self.transaction)
        self.columns.append(columns)
        self._rows += len(columns)
        self._documents += len(columns)
        self._tokens += int(columns[:, TOKENS].sum())

    def bury(self, rows: Sequence[int], columns: np.ndarray) -> None:
        """Mark rows, of the bank's `columns`, as deleted."""
        array = self.database.array("documents", self.transaction)
        for pending in [array[row, ALIVE].write(np.int64(0)) for row in rows]:
            pending.result()
        self.buried += rows
        self._documents -= len(rows)
        self._tokens -= int(columns[rows, TOKENS].sum())

    def manifest(self, version: int, operation: str) -> Manifest:
        """Of the bank as changed."""
        return dataclasses.replace(
            self._manifest,
            version=version,
            chunks=self.chunks,
            rows=self._rows,
            documents=self._documents,
            tokens=self._tokens,
            namespaces=tuple(self.namespaces),
            next_text=self.next_text,
            operation=operation,
            time=now(),
        )


@contextlib.contextmanager
def commit(database: Database, manifest: Manifest, version: int, operation: str) -> Iterator[Change]:
    """A change that is committed when the block ends, as `version`; nothing is when it raises."""
    with database.commit() as transaction:
        change = Change(database, transaction, manifest)
        yield change
        database.write("manifest", change.manifest(version, operation).to_bytes(), transaction)


def make_database(url: str, manifest: Manifest) -> Database:
    """A new database with the arrays of an empty bank."""
    spec, database = manifest.spec, Database(url)
    size = np.dtype("float32").itemsize if spec.dtype == "float32" else 2
    rests = dict(routing_keys=(spec.width,), content_k=(spec.kv_heads, spec.head_dim))
    rests["content_v"] = rests["content_k"]
    with database.commit() as transaction:
        for name, rest in rests.items():
            piece = max(64, _PIECE_BYTES // (size * int(np.prod(rest))))
            database.create_array(name, (spec.layers, 0, *rest), (1, piece, *rest), spec.dtype, transaction)
        database.create_array("documents", (0, COLUMNS), (_ROWS_PER_PIECE, COLUMNS), "int64", transaction)
        database.write("manifest", manifest.to_bytes(), transaction)
    return database
