"""`BankWriter`: whole commits to a bank on disk, of documents that are encoded already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from msa_jax.bank.change import Change, Encoded, commit
from msa_jax.bank.reader import ARRAYS, BankReader
from msa_jax.bank.table import DEFAULT_NAMESPACE, PLACE, BankDocument, key_of, pack_body
from msa_jax.errors import BankError
from msa_jax.memory.places import behind


class BankWriter(BankReader):
    """A bank that, opened writable, is changed one commit at a time. `MemoryStore` is its face."""

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
            starts = behind(encoded.lengths, self.manifest.chunks)
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
