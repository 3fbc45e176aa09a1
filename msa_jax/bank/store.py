"""`MemoryStore`: a bank on disk that documents are added to, changed in and deleted from, one commit at a time.

A bank is a TensorStore OCDBT database (`folder` says where) of the manifest, the arrays routing_keys [L_r, C, M],
content_k and content_v [L_r, C, K, D] and documents [N, 9], and the documents' ids, titles, texts and metadata.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from msa_jax.bank import folder
from msa_jax.bank.change import Change, commit, make_database, now
from msa_jax.bank.database import Database, is_folder, reason_of
from msa_jax.bank.manifest import BankError, BankSpec, Manifest
from msa_jax.bank.table import (
    ALIVE,
    COLUMNS,
    DEFAULT_NAMESPACE,
    NAMESPACE,
    BankDocument,
    Table,
    body_key,
    key_of,
    pack_body,
    unpack,
)  # fmt: skip

ARRAYS = ("routing_keys", "content_k", "content_v")


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
        if writable and version is not None:
            raise BankError(f"{path}: an earlier version is for reading: open it with writable=False.")
        if folder.current(path) is None:
            raise BankError(f"{path}: no bank here: make one with `create`, or correct the path.")
        try:
            if writable:
                self._writer_lock = folder.take_writer_lock(path, wait=wait)
            self.open(version)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: str | pathlib.Path, spec: BankSpec) -> MemoryStore:
        """Make an empty bank and open it for writing.

        Raises:
          BankError: there is a bank already, or the place cannot be written.
        """
        try:
            if is_folder(path):
                pathlib.Path(path).mkdir(parents=True, exist_ok=True)
            if folder.current(path) is not None:
                raise BankError(f"{path}: there is a bank already: open it, or delete it first.")
            lock = folder.take_writer_lock(path)
            try:
                folder.remove(path, folder.FIRST)  # of a `create` that was killed
                make_database(folder.database_url(path, folder.FIRST), Manifest(spec=spec, version=1, time=now()))
                folder.switch(path, folder.FIRST)
            finally:
                folder.release(lock)
        except (OSError, ValueError) as e:
            raise e if isinstance(e, BankError) else BankError(f"{path}: a bank cannot be made here: {e}") from e
        return cls(path, writable=True)

    def open(self, version: int | None = None) -> None:
        """Read the manifest and the table of the newest version, or of an earlier one."""
        try:
            self._hold_current()
            url = folder.database_url(self.path, self.name)
            # A reader pins the generation that it found, so that it never sees two.
            generation = None if self._writable else _generation_of(url, version, str(self.path))
            self.database = Database(url, generation=generation)
            self.manifest = _manifest_of(self.database, str(self.path))
            columns = np.array(self.database.array("documents").read().result())[: self.manifest.rows]
            if len(columns) < self.manifest.rows or columns.shape[1] != COLUMNS:
                raise BankError(f"{self.path}: the table of documents is cut short: restore the bank from a copy.")
            self.table = Table(self.manifest.namespaces, columns)
        except BankError:
            raise
        except (ValueError, OSError) as e:
            raise BankError(f"{self.path}: the bank is damaged or unreadable: {reason_of(e)}") from e

    def _hold_current(self) -> None:
        while True:
            self.name = folder.current(self.path)
            folder.release(self._reader_lock)
            self._reader_lock = folder.take_reader_lock(self.path, self.name)
            # Compaction may have come between.
            if folder.current(self.path) == self.name:
                return

    # Reading.

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
        try:
            bodies = [unpack(raw) for raw in self.database.read_many(list(map(body_key, rows)))]
            return [
                BankDocument(
                    id=identity, title=title, text=text, metadata=metadata,
                    namespace=table.namespaces[table.columns[row, NAMESPACE]],
                )
                for row, (identity, title, text, metadata) in zip(rows, bodies, strict=True)
            ]  # fmt: skip
        except (ValueError, OSError) as e:
            raise BankError(f"{self.path}: the text of a document is damaged: {reason_of(e)}") from e

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
        row = self.table.row_of(key_of(namespace, identity))
        if row is None:
            raise BankError(f"{self.path}: no document {identity!r} in namespace {namespace!r}: nothing was changed.")
        return row

    def _commit(self, documents, encoded, sources, *, buried, operation):
        places = np.zeros((len(documents), 3), np.int64)  # START, LENGTH, TOKENS
        if documents:
            starts = self.manifest.chunks + np.cumsum(encoded.lengths) - encoded.lengths
            encoded_places = np.stack([starts, encoded.lengths, encoded.tokens], axis=1)
            for i, source in enumerate(sources):
                places[i] = encoded_places[source] if source >= 0 else self.table.columns[-1 - source, :3]
        with self.change(operation) as change:
            if documents and len(encoded.lengths):
                for name in ARRAYS:
                    change.database.put(name, getattr(encoded, name), change.chunks, 1, change.transaction)
                change.chunks += int(encoded.lengths.sum())
            columns = change.columns_of(documents, places)
            change.add(columns, [d.id for d in documents], list(map(pack_body, documents)))
            change.bury(buried, self.table.columns)

    @contextlib.contextmanager
    def change(self, operation: str) -> Iterator[Change]:
        """A change that is committed when the block ends, as the next version, which this object then shows."""
        self.require_writable()
        version = self.version + 1
        try:
            with commit(self.database, self.manifest, version, operation) as change:
                yield change
        except BaseException:
            with contextlib.suppress(BankError):
                self.open()  # an interrupted commit may have come through
            raise
        self.manifest = change.manifest(version, operation)
        self.table.namespaces = change.namespaces
        self.table.bury(change.buried)
        for columns in change.columns:
            self.table.extend(columns)

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

    def __enter__(self) -> MemoryStore:
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
        raise BankError(f"{where}: no version {version}: `versions` lists those there are.")
    return low
