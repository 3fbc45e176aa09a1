"""`BankReader`: a bank on disk, at one version.

A bank is a TensorStore OCDBT database (`folder` says where) of the manifest, the arrays routing_keys [L_r, C, M],
content_k and content_v [L_r, C, K, D] and documents [N, 10], and the documents' ids, titles, texts and metadata.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import tensorstore as ts

from msa_jax.bank import folder
from msa_jax.bank.database import Database, refusing
from msa_jax.bank.manifest import BankSpec, Manifest
from msa_jax.bank.table import (
    ALIVE,
    COLUMNS,
    DEFAULT_NAMESPACE,
    NAMESPACE,
    BankDocument,
    Table,
    body_key,
    key_of,
    unpack,
)  # fmt: skip
from msa_jax.errors import BankError

ARRAYS = ("routing_keys", "content_k", "content_v")


class BankReader:
    """What a bank holds at one version, whatever a writer does meanwhile.

    Attributes:
      path: as given.
      name: of the database in use; `compact` begins another, in which rows and chunks have other numbers.
      manifest: the state of this version.
      table: rows of this version; for reading.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        writable: bool = False,
        version: int | None = None,
        wait: float = 0.0,
    ):
        """Open a bank.

        Args:
          path: a folder, or a kvstore URL that TensorStore knows.
          writable: take the lock of the one writer.
          version: an earlier version to read; default the newest.
          wait: seconds to wait for another writer to finish.

        Raises:
          BankError: no bank there, a damaged one, one of a newer format, no such version, or another writer.
        """
        self.path = path
        self._writer_lock = self._reader_lock = None
        self._writable = writable
        if folder.current(path) is None:
            raise BankError(f"{path}: no bank here: make one with `create`, or correct the path.")
        try:
            if writable:
                self._writer_lock = folder.take_writer_lock(path, wait=wait)
            self.refresh(version)
        except BaseException:
            self.close()
            raise

    def refresh(self, version: int | None = None) -> None:
        """Go to the newest version, or to an earlier one.

        Raises:
          BankError: a damaged bank, or no such version; it stays where it was then.
        """
        if self._writable and version is not None:
            raise BankError(f"{self.path}: an earlier version is for reading: open it with writable=False.")
        name, lock = self._hold_current()
        try:
            with refusing(f"{self.path}: the bank is damaged or unreadable"):
                url = folder.database_url(self.path, name)
                # A reader pins the generation that it found, so that it never sees two.
                generation = None if self._writable else _generation_of(url, version, str(self.path))
                database = Database(url, generation=generation)
                manifest = _manifest_of(database, str(self.path))
                columns = np.array(database.array("documents").read().result())[: manifest.rows]
                if len(columns) < manifest.rows or columns.shape[1] != COLUMNS:
                    raise BankError(f"{self.path}: the table of documents is cut short: restore the bank from a copy.")
                table = Table(manifest.namespaces, columns)
        except BaseException:
            folder.release(lock)
            raise
        folder.release(self._reader_lock)
        self.name, self._reader_lock = name, lock
        self.database, self.manifest, self.table = database, manifest, table

    def _hold_current(self) -> tuple[str, int | None]:
        """The database in use, and a lock that keeps it."""
        while True:
            name = folder.current(self.path)
            lock = folder.take_reader_lock(self.path, name)
            # Compaction may have come between.
            if folder.current(self.path) == name:
                return name, lock
            folder.release(lock)

    @property
    def spec(self) -> BankSpec:
        return self.manifest.spec

    @property
    def version(self) -> int:
        return self.manifest.version

    def __len__(self) -> int:
        return self.manifest.documents

    def get(self, identity: str, namespace: str = DEFAULT_NAMESPACE) -> BankDocument:
        """The live document of an id.

        Raises:
          KeyError: there is none in that namespace.
        """
        row = self.table.row_of(key_of(namespace, identity))
        if row is None:
            raise KeyError(f"{self.path}: no document {identity!r} in namespace {namespace!r}.")
        return self.documents([row])[0]

    def documents(self, rows: Sequence[int]) -> list[BankDocument]:
        """Documents of rows, read at once.

        Raises:
          BankError: a damaged text.
        """
        table = self.table
        with refusing(f"{self.path}: the text of a document is damaged"):
            bodies = [unpack(raw) for raw in self.database.read_many(list(map(body_key, rows)))]
            return [
                BankDocument(
                    id=identity, title=title, text=text, metadata=metadata,
                    namespace=table.namespaces[table.columns[row, NAMESPACE]],
                )
                for row, (identity, title, text, metadata) in zip(rows, bodies, strict=True)
            ]  # fmt: skip

    def search(self, prefix: str = "", namespace: str | None = None) -> Iterator[tuple[str, str]]:
        """(namespace, id) of live documents whose id begins with `prefix`, in the order they were added."""
        columns, names = self.table.columns, self.table.namespaces
        for key in self.database.keys("names/"):
            first = int(key.removeprefix("names/"))
            for row, identity in enumerate(unpack(self.database.read(key)), start=first):
                space = names[columns[row, NAMESPACE]]
                if columns[row, ALIVE] and identity.startswith(prefix) and namespace in (None, space):
                    yield space, identity

    def array(self, name: str) -> ts.TensorStore:
        """One of `ARRAYS`, on disk: slices of it are read when asked for."""
        return self.database.array(name)

    def versions(self, last: int | None = None) -> list[Manifest]:
        """Manifests of the versions that can be opened, oldest first, or of the `last` ones."""
        found: dict[int, Manifest] = {}
        for generation in range(Database(self.database.url).newest(), 0, -1):
            database = Database(self.database.url, generation=generation)
            if database.read("manifest") is None or len(found) == last:
                break  # the first generations are of the database's own making
            manifest = _manifest_of(database, str(self.path))
            found.setdefault(manifest.version, manifest)
        return [found[version] for version in sorted(found)]

    def require_writable(self) -> None:
        """Raises BankError when it was opened for reading."""
        if not self._writable:
            raise BankError(f"{self.path}: opened for reading: open it with writable=True to change it.")

    def close(self) -> None:
        """Give the locks back."""
        folder.release(self._writer_lock)
        folder.release(self._reader_lock)
        self._writer_lock = self._reader_lock = None
        self._writable = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _manifest_of(database: Database, where: str) -> Manifest:
    raw = database.read("manifest")
    if raw is None:
        raise BankError(f"{where}: the database has no manifest: restore the bank from a copy.")
    return Manifest.from_bytes(raw, where)


def _generation_of(url: str, version: int | None, where: str) -> int:
    """The last commit of a version, by default of the newest; versions never fall from a commit to the next."""

    def version_at(generation):
        database = Database(url, generation=generation)
        # The first generations are of the database's own making.
        return 0 if database.read("manifest") is None else _manifest_of(database, where).version

    last = Database(url).newest()
    if version is None:
        return last
    low, high = 1, last
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if version_at(middle) > version else (middle, high)
    if version < 1 or version_at(low) != version:
        raise BankError(f"{where}: no version {version}: `stats` lists those there are.")
    return low
