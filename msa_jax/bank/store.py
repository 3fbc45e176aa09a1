"""`MemoryStore`: a bank on disk that documents are added to, changed in and deleted from, one commit at a time."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from msa_jax.bank import compaction, folder, ingest, verify
from msa_jax.bank.change import Change, Encoded, commit, make_database, now
from msa_jax.bank.database import folder_of
from msa_jax.bank.document_encoder import DocumentEncoder
from msa_jax.bank.ingest import Report
from msa_jax.bank.manifest import BankError, BankSpec, Manifest
from msa_jax.bank.numbers import Numbers
from msa_jax.bank.reader import ARRAYS, BankReader
from msa_jax.bank.table import DEFAULT_NAMESPACE, PLACE, BankDocument, key_of, pack_body


class MemoryStore(BankReader):
    """A bank on disk, for reading and, by one process at a time, for writing.

    Use as a context manager, or `close` it. A reader stays at the version it opened until `refresh`; a writer sees
    its own commits. Attributes are those of `BankReader`.
    """

    @classmethod
    def create(cls, path: str | pathlib.Path, spec: BankSpec) -> MemoryStore:
        """Make an empty bank and open it for writing.

        Raises:
          BankError: there is a bank already, or the place cannot be written.
        """
        try:
            if (place := folder_of(path)) is not None:
                place.mkdir(parents=True, exist_ok=True)
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

    @classmethod
    def open(cls, path: str | pathlib.Path, *, writable: bool = False, version: int | None = None) -> MemoryStore:
        """Open a bank: what the constructor does."""
        return cls(path, writable=writable, version=version)

    def add(
        self,
        documents: Iterable[BankDocument],
        encoder: DocumentEncoder,
        *,
        commit_tokens: int | None = None,
        progress: bool = False,
        total: int | None = None,
    ) -> Report:
        """Add documents, encoding only texts that their namespace does not hold.

        A commit is made every `commit_tokens` tokens. A document that is there already with the same text is passed
        over, so the same call after an interruption goes on from the last commit. A text is encoded with its number,
        which no other text of the bank ever had or will have; documents that share a text share its number.

        Args:
          documents: an iterable that is read once, never held whole, in a thread.
          encoder: of the bank's model.
          commit_tokens: tokens encoded between commits; sets the memory needed. Default: what 128 MiB of chunks
            are, 1M at most.
          progress: show a progress bar of documents.
          total: how many documents there are, if known: the bar then tells the time that is left.

        Raises:
          BankError: opened for reading; a bank of another model or tokenizer; an id that is there with another text,
            or comes twice; a document without text or over the limit; no numbers left; no room. What was committed
            before stays; of the rest nothing does.
        """
        options = dict(commit_tokens=commit_tokens, progress=progress, total=total)
        return self._ingest(documents, encoder, replace=False, **options)

    def update(
        self,
        documents: Iterable[BankDocument],
        encoder: DocumentEncoder,
        *,
        commit_tokens: int | None = None,
        progress: bool = False,
        total: int | None = None,
    ) -> Report:
        """Give documents that exist new texts, titles or metadata. See `add`.

        Raises:
          BankError: as `add`, and for an id that does not exist.
        """
        options = dict(commit_tokens=commit_tokens, progress=progress, total=total)
        return self._ingest(documents, encoder, replace=True, **options)

    def _ingest(self, documents, encoder, **options):
        numbers = Numbers(self.path, self.manifest.next_text)
        try:
            return ingest.ingest(self, documents, encoder, numbers, **options)
        finally:
            with contextlib.suppress(BankError):  # what is not given back is lost, and nothing else
                numbers.give_back(self.manifest.next_text)

    def compact(self, *, progress: bool = False) -> dict[str, Any]:
        """Reclaim the place of deleted documents and of earlier versions; see `compaction.compact`."""
        return compaction.compact(self, progress=progress)

    def verify(self, *, progress: bool = False) -> dict[str, Any]:
        """Read everything and compare it with its checksums; see `verify.verify`."""
        return verify.verify(self, progress=progress)

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
        places = np.zeros((len(documents), len(PLACE)), np.int64)
        if documents:
            starts = self.manifest.chunks + np.cumsum(encoded.lengths) - encoded.lengths
            encoded_places = np.stack([starts, encoded.lengths, encoded.tokens, encoded.numbers], axis=1)
            for i, source in enumerate(sources):
                places[i] = encoded_places[source] if source >= 0 else self.table.columns[-1 - source, PLACE]
        with self.change(operation) as change:
            if documents and len(encoded.lengths):
                for name in ARRAYS:
                    change.database.put(name, getattr(encoded, name), change.chunks, 1, change.transaction)
                change.chunks += int(encoded.lengths.sum())
                change.next_text = max(change.next_text, int(encoded.ordinals.max()) + 1)
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
                self.refresh()  # an interrupted commit may have come through
            raise
        self.manifest = change.manifest(version, operation)
        self.table.namespaces = change.namespaces
        self.table.bury(change.buried)
        for columns in change.columns:
            self.table.extend(columns)
