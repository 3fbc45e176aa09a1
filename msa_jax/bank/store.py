"""`MemoryStore`: a bank on disk that documents are added to, changed in and deleted from, one commit at a time."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable
from typing import Any

from msa_jax.bank import compaction, folder, ingest, verify
from msa_jax.bank.change import make_database, now
from msa_jax.bank.database import folder_of, refusing
from msa_jax.bank.document_encoder import DocumentEncoder
from msa_jax.bank.ingest import Report
from msa_jax.bank.manifest import BankSpec, Manifest
from msa_jax.bank.numbers import Numbers
from msa_jax.bank.table import BankDocument
from msa_jax.bank.writer import BankWriter
from msa_jax.errors import BankError


class MemoryStore(BankWriter):
    """A bank on disk, for reading and, by one process at a time, for writing.

    Use as a context manager, or `close` it. A reader stays at the version it opened until `refresh`; a writer sees
    its own commits. Attributes are those of `BankReader`; `append`, `replace`, `delete`, `change` `BankWriter`'s.
    """

    @classmethod
    def create(cls, path: str | pathlib.Path, spec: BankSpec) -> MemoryStore:
        """Make an empty bank and open it for writing.

        Raises:
          BankError: there is a bank already, or the place cannot be written.
        """
        with refusing(f"{path}: a bank cannot be made here"):
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

    def update(self, documents: Iterable[BankDocument], encoder: DocumentEncoder, **options: Any) -> Report:
        """Give documents that exist new texts, titles or metadata. `options` as of `add`.

        Raises:
          BankError: as `add`, and for an id that does not exist.
        """
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
