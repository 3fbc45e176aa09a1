"""`MemoryStore`: a bank on disk that documents are added to, changed in and deleted from, one commit at a time.

folder/CURRENT        name of the database in use
folder/bank-N/        a TensorStore OCDBT database: manifest, routing_keys [L_r, C, M], content_k and content_v
                      [L_r, C, K, D], documents [N, 5], ids and texts
folder/writer.lock    held by the one process that may write
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from msa_jax.bank import table as documents_of
from msa_jax.bank.database import Database, reason_of, url_of
from msa_jax.bank.manifest import BankError, BankSpec, Manifest
from msa_jax.bank.table import ALIVE, COLUMNS, DEFAULT_NAMESPACE, BankDocument, Table

ARRAYS = ("routing_keys", "content_k", "content_v")
# Bytes of one stored piece of an array: large enough for object stores, small enough to read a few documents.
_PIECE_BYTES = 1 << 20
_ROWS_PER_PIECE = 16_384


class Encoded(NamedTuple):
    """Chunks of several documents, one after another.

    Attributes:
      routing_keys: [L_r, C, M]; content_k, content_v: [L_r, C, K, D].
      lengths: chunks of each document.
      tokens: tokens of each document.
    """

    routing_keys: np.ndarray
    content_k: np.ndarray
    content_v: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray


class MemoryStore:
    """A bank on disk at one version; see the module. Use as a context manager, or `close` it.

    Readers see the version they opened, whatever a writer does. A writer sees its own commits.
    """

    def __init__(self, path: str | pathlib.Path, *, writable: bool = False, version: int | None = None):
        """Open a bank.

        Args:
          path: a folder, or a kvstore URL that TensorStore knows.
          writable: take the lock of the one writer.
          version: an earlier version to read; default the newest.

        Raises:
          BankError: no bank there, a damaged one, one of a newer format, no such version, or another writer.
        """
        self.path = path
        self._url = url_of(path)
        self._lock: int | None = None
        if writable and version is not None:
            raise BankError(f"{path}: an earlier version is for reading: open it with writable=False.")
        current = _current(self._url)
        if current is None:
            raise BankError(f"{path}: no bank here: make one with `create`, or correct the path.")
        if writable:
            self._lock = _take_lock(path)
        try:
            self._open(current, version)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: str | pathlib.Path, spec: BankSpec) -> MemoryStore:
        """Make an empty bank and open it for writing.

        Raises:
          BankError: there is a bank already, or the place cannot be written.
        """
        url = url_of(path)
        try:
            if "://" not in str(path):
                pathlib.Path(path).mkdir(parents=True, exist_ok=True)
            if _current(url) is not None:
                raise BankError(f"{path}: there is a bank already: open it, or delete the folder first.")
            _make(f"{url}bank-0/", Manifest(spec=spec, version=1, time=_now()))
            ts.KvStore.open(url).result().write("CURRENT", b"bank-0").result()
        except (OSError, ValueError) as e:
            raise e if isinstance(e, BankError) else BankError(f"{path}: a bank cannot be made here: {e}") from e
        return cls(path, writable=True)

    def _open(self, current: str, version: int | None) -> None:
        url = f"{self._url}{current}/"
        self._name = current
        try:
            generation = None if version is None else _generation_of(url, version, str(self.path))
            # A reader pins the generation that it found, so that it never sees two.
            if generation is None and self._lock is None:
                generation = Database(url).generations()[-1]
            self._database = Database(url, generation=generation)
            raw = self._database.read("manifest")
            if raw is None:
                raise BankError(f"{self.path}: the database {current} has no manifest: restore the folder from a copy.")
            self.manifest = Manifest.from_bytes(raw, str(self.path))
            self._table = Table.read(self._database, self.manifest.namespaces)
        except BankError:
            raise
        except (ValueError, OSError) as e:
            raise BankError(f"{self.path}: the bank is damaged or unreadable: {reason_of(e)}") from e

    # Reading.

    @property
    def spec(self) -> BankSpec:
        return self.manifest.spec

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def table(self) -> Table:
        """Rows of this version; for reading."""
        return self._table

    def __len__(self) -> int:
        return self.manifest.documents

    def get(self, identity: str, namespace: str = DEFAULT_NAMESPACE) -> BankDocument:
        """The live document of an id.

        Raises:
          KeyError: there is none in that namespace.
        """
        row = self._table.row_of(namespace, identity)
        if row is None:
            raise KeyError(f"{self.path}: no document {identity!r} in namespace {namespace!r}.")
        return self.documents([row])[0]

    def documents(self, rows: Sequence[int]) -> list[BankDocument]:
        """Documents of rows, their texts read at once."""
        bodies = [documents_of.unpack(raw) for raw in self._database.read_many(list(map(documents_of.text_key, rows)))]
        table = self._table
        return [
            BankDocument(
                id=table.ids[row],
                title=table.titles[row],
                namespace=table.namespaces[table.columns[row, documents_of.NAMESPACE]],
                **body,
            )
            for row, body in zip(rows, bodies, strict=True)
        ]

    def search(self, prefix: str = "", namespace: str | None = None) -> list[tuple[str, str]]:
        """(namespace, id) of live documents whose id begins with `prefix`, in the order they were added."""
        table = self._table
        names = [(table.namespaces[table.columns[r, documents_of.NAMESPACE]], table.ids[r]) for r in table.alive]
        return [n for n in names if n[1].startswith(prefix) and namespace in (None, n[0])]

    def array(self, name: str) -> ts.TensorStore:
        """One of `ARRAYS`, on disk: slices of it are read when asked for."""
        return self._database.array(name)

    def versions(self) -> list[Manifest]:
        """Manifests of all versions that can be opened, oldest first."""
        found = []
        for generation in Database(self._database.url).generations():
            raw = Database(self._database.url, generation=generation).read("manifest")
            if raw is not None:
                found.append(Manifest.from_bytes(raw, str(self.path)))
        return found

    # Writing.

    def append(self, documents: Sequence[BankDocument], encoded: Encoded, sources: Sequence[int]) -> None:
        """Commit new documents: all of them appear at once, or none.

        Args:
          documents: ids must be new to their namespaces.
          encoded: chunks of the texts that the bank does not hold yet.
          sources: for each document the index of its text in `encoded`, or -1 - row for a text that row holds.
        """
        self._commit(documents, encoded, sources, buried=[], operation="add")

    def replace(self, documents: Sequence[BankDocument], encoded: Encoded, sources: Sequence[int]) -> None:
        """Commit new texts of documents that exist: every one changes at once."""
        buried = [self._live_row(d.namespace, d.id) for d in documents]
        self._commit(documents, encoded, sources, buried=buried, operation="update")

    def delete(self, ids: Iterable[str], namespace: str = DEFAULT_NAMESPACE) -> int:
        """Delete documents in one commit: invisible from now on, their place reclaimed by `compact`.

        Returns:
          How many.

        Raises:
          BankError: an id that does not exist; nothing is deleted then.
        """
        buried = [self._live_row(namespace, identity) for identity in dict.fromkeys(ids)]
        if buried:
            self._commit([], None, [], buried=buried, operation="delete")
        return len(buried)

    def _live_row(self, namespace: str, identity: str) -> int:
        row = self._table.row_of(namespace, identity)
        if row is None:
            raise BankError(f"{self.path}: no document {identity!r} in namespace {namespace!r}: nothing was changed.")
        return row

    def _commit(self, documents, encoded, sources, *, buried, operation):
        self._require_writable()
        manifest, table = self.manifest, self._table
        namespaces = list(dict.fromkeys([*manifest.namespaces, *(d.namespace for d in documents)]))
        columns = np.zeros((len(documents), COLUMNS), np.int64)
        if documents:
            starts = manifest.chunks + np.concatenate([[0], np.cumsum(encoded.lengths)])
            for i, (document, source) in enumerate(zip(documents, sources, strict=True)):
                known = table.columns[-1 - source, :3] if source < 0 else None
                place = (starts[source], encoded.lengths[source], encoded.tokens[source]) if known is None else known
                columns[i] = (*place, namespaces.index(document.namespace), 1)
        chunks = manifest.chunks + (int(encoded.lengths.sum()) if documents else 0)
        dead = table.columns[buried]
        new = dataclasses.replace(
            manifest,
            version=manifest.version + 1,
            chunks=chunks,
            rows=manifest.rows + len(documents),
            documents=manifest.documents + len(documents) - len(buried),
            tokens=manifest.tokens + int(columns[:, documents_of.TOKENS].sum() - dead[:, documents_of.TOKENS].sum()),
            namespaces=tuple(namespaces),
            operation=operation,
            time=_now(),
        )
        database = self._database
        with database.commit() as transaction:
            if documents and chunks > manifest.chunks:
                for name in ARRAYS:
                    database.append(name, getattr(encoded, name), 1, transaction)
            if documents:
                database.append("documents", columns, 0, transaction)
                database.write(documents_of.rows_key(manifest.rows), documents_of.pack_rows(documents), transaction)
                for row, document in enumerate(documents, start=manifest.rows):
                    database.write(documents_of.text_key(row), documents_of.pack_text(document), transaction)
            if buried:
                array = database.array("documents", transaction)
                pending = [array[row, ALIVE].write(np.int64(0)) for row in buried]
                for write in pending:
                    write.result()
            database.write("manifest", new.to_bytes(), transaction)
        self.manifest = new
        table.namespaces = namespaces
        table.bury(buried)
        table.extend(columns, [(d.id, d.title, d.digest) for d in documents])

    def _require_writable(self) -> None:
        if self._lock is None:
            raise BankError(f"{self.path}: opened for reading: open it with writable=True to change it.")

    def close(self) -> None:
        """Give the writer's lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _make(url: str, manifest: Manifest) -> Database:
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


def _current(url: str) -> str | None:
    try:
        result = ts.KvStore.open(url).result().read("CURRENT").result()
    except (ValueError, OSError) as e:
        raise BankError(f"{url}: cannot be read: {reason_of(e)}") from e
    return None if result.state == "missing" else result.value.decode().strip()


def _generation_of(url: str, version: int, where: str) -> int:
    for generation in Database(url).generations():
        raw = Database(url, generation=generation).read("manifest")
        if raw is not None and Manifest.from_bytes(raw, where).version == version:
            return generation
    raise BankError(f"{where}: no version {version}: `versions` lists those there are.")


def _take_lock(path: str | pathlib.Path) -> int | None:
    if "://" in str(path):
        return os.open(os.devnull, os.O_RDWR)  # no lock there: see docs/bank.md
    try:
        descriptor = os.open(pathlib.Path(path) / "writer.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise BankError(f"{path}: cannot be written: {e.strerror}. Mend permissions, or open it for reading.") from e
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(descriptor)
        raise BankError(f"{path}: another process is writing to this bank: wait until it is done, or stop it.") from e
    return descriptor


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

