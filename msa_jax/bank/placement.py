"""Which document and chunk of a bank on disk stands where on the device, and how that changes as the bank grows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from msa_jax.bank.database import url_of
from msa_jax.bank.reader import BankReader
from msa_jax.bank.table import ALIVE, LENGTH, NAMESPACE, START
from msa_jax.errors import BankError
from msa_jax.memory.places import capacity_for, chunks_of, in_parts, shares_of

# What a bank that was outgrown gets beyond what it needs, so that it is not outgrown again by the next document.
_ROOM_AFTER = 1 / 16
# Bits of a text's key that hold its namespace.
_NAMESPACE_BITS = 24


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the documents of one version of a store are on the device. Arrays are NumPy's, on the host.

    Places are in S equal parts, one for each device that shares the bank; a document's chunks lie in its part. In each
    part documents and chunks are in the order they came. What was deleted keeps its place, as nobody's, until all is
    placed anew.

    Attributes:
      origin: the store's place, and the database in it whose chunk numbers these are.
      version: of the store.
      only: the namespaces that were asked for; None means all, those to come as well.
      among: [n] int64, the rows of the store's table that were asked for, ascending; None means all.
      names: of the store's namespaces.
      rows: [N] int64, row in the store's table of each document, -1 where there is none; documents of equal text in
        one namespace are one document here, and the row is that of one that lives.
      namespaces: [N] int64, number of each document's namespace, -1 where there is no document.
      starts, lengths: [N] int32, chunks of each document; length 0 where there is none.
      chunk_documents: [C] int32, N for a chunk of no document.
      source: [C] int64, where each chunk is on disk, -1 for those never filled.
      documents, chunks: [S] int64, how many places of each part are taken, by the deleted too: its first ones.
      max_length: bound on lengths that the layout is compiled for.
      room: spare capacity asked for, as part of what is needed.
    """

    origin: tuple[str, str]
    version: int
    only: tuple[str, ...] | None
    among: np.ndarray | None
    names: tuple[str, ...]
    rows: np.ndarray
    namespaces: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    chunk_documents: np.ndarray
    source: np.ndarray
    documents: np.ndarray
    chunks: np.ndarray
    max_length: int
    room: float

    @classmethod
    def of(
        cls,
        store: BankReader,
        *,
        only: Sequence[str] | None,
        among: np.ndarray | None = None,
        room: float,
        parts: int = 1,
        like: Placement | None = None,
    ) -> Placement:
        """Place all live documents of a store.

        Args:
          only: namespaces; names that the store does not have stand for no document. None means all.
          among: rows of the table, ascending; None means all.
          room: spare capacity, as part of what is needed.
          parts: S. They get about as many chunks each, of documents that lie side by side on disk.
          like: keep the sizes of this one, which are compiled for, where that wastes less than half.
        """
        keys, rows = _texts(store, only, among)
        lengths = store.table.columns[rows, LENGTH]

        def kept(wanted, before):
            return before if wanted <= before < 2 * wanted else wanted

        none = np.zeros(parts, np.int64)
        shares = shares_of(lengths, none, none, int(lengths.sum()), len(rows))

        def room_for(sizes, before):
            return kept(parts * capacity_for(math.ceil(max(sizes) * (1 + room))), before)

        chunks = room_for([lengths[share].sum() for share in shares], like.source.size if like else 0)
        documents = room_for([len(rows[share]) for share in shares], like.rows.size if like else 0)
        longest = capacity_for(int(lengths.max(initial=1)), multiple=1)
        empty = cls(
            origin=origin_of(store),
            version=store.version,
            only=None if only is None else tuple(only),
            among=among,
            names=tuple(store.table.namespaces),
            rows=np.full(documents, -1, np.int64),
            namespaces=np.full(documents, -1, np.int64),
            starts=np.zeros(documents, np.int32),
            lengths=np.zeros(documents, np.int32),
            chunk_documents=np.full(chunks, documents, np.int32),
            source=np.full(chunks, -1, np.int64),
            documents=none,
            chunks=none,
            max_length=kept(longest, like.max_length if like else 0),
            room=room,
        )
        return empty._with(keys, rows, lengths, shares)

    def follow(self, store: BankReader) -> Placement | None:
        """The placement of another version: what is not in it becomes nobody's, what is new comes behind the rest of
        the parts with most room.

        Returns:
          This one for the same version. None when what stands on the device cannot stay where it is: the bank was
          compacted or is another one, or has outgrown its parts.
        """
        if origin_of(store) != self.origin:
            return None
        if store.version == self.version:
            return self
        keys, rows = _texts(store, self.only, self.among)
        placed = np.flatnonzero(self.lengths)
        mine = _key(self.source[self.starts[placed]], self.namespaces[placed])
        # Both sides hold each key once.
        _, stays, found = np.intersect1d(mine, keys, assume_unique=True, return_indices=True)
        gone, stays = np.delete(placed, stays), placed[stays]
        new = np.ones(len(keys), bool)
        new[found] = False
        fresh = rows[new]
        lengths = store.table.columns[fresh, LENGTH]
        shares = shares_of(lengths, self.chunks, self.documents, self.part_chunks, self.part_documents)
        if shares is None:
            return None
        changed = {name: getattr(self, name).copy() for name in ("rows", "namespaces", "lengths")}
        changed["rows"][stays] = rows[found]
        changed["rows"][gone], changed["namespaces"][gone], changed["lengths"][gone] = -1, -1, 0
        nobody = np.arange(self.rows.size + 1, dtype=np.int32)
        nobody[gone] = self.rows.size
        names = tuple(store.table.namespaces)
        return dataclasses.replace(
            self, version=store.version, names=names, chunk_documents=nobody[self.chunk_documents], **changed
        )._with(keys[new], fresh, lengths, shares)

    def anew(self, store: BankReader) -> Placement:
        """All live documents of a store placed as they were asked for, with some room to grow into.

        Raises:
          BankError: rows were asked for, and the store has given rows other numbers.
        """
        if self.among is not None:
            raise BankError(f"{store.path}: its rows have other numbers than those that were loaded; load it again.")
        room = max(self.room, _ROOM_AFTER)
        return Placement.of(store, only=self.only, room=room, parts=len(self.chunks), like=self)

    def includes(self, row: int) -> bool:
        """Whether a row of the store's table is among those that were asked for."""
        if self.among is None:
            return True
        at = np.searchsorted(self.among, row)
        return bool(at < len(self.among) and self.among[at] == row)

    @property
    def part_chunks(self) -> int:
        """Chunks that a part has room for, C / S."""
        return self.source.size // len(self.chunks)

    @property
    def part_documents(self) -> int:
        """Documents that a part has room for, N / S."""
        return self.rows.size // len(self.documents)

    def filled(self, since: Placement | None = None) -> list[tuple[int, int]]:
        """Range of chunks that each part has filled, since an earlier placement that this one follows."""
        before = since.chunks if since else np.zeros_like(self.chunks)
        origins = self.part_chunks * np.arange(len(self.chunks))
        return list(zip((origins + before).tolist(), (origins + self.chunks).tolist(), strict=True))

    def _with(self, keys, rows, lengths, shares) -> Placement:
        """Texts that are new, placed behind all others of the parts whose shares they are."""
        names = "rows", "namespaces", "starts", "lengths", "chunk_documents", "source", "documents", "chunks"
        new = {name: getattr(self, name).copy() for name in names}
        parts = shares, self.documents, self.chunks, self.part_documents, self.part_chunks
        places, starts = in_parts(lengths, *parts)
        chunks = chunks_of(starts, lengths)
        new["rows"][places] = rows
        new["namespaces"][places] = keys & ((1 << _NAMESPACE_BITS) - 1)
        new["starts"][places], new["lengths"][places] = starts, lengths
        new["chunk_documents"][chunks] = np.repeat(places, lengths)
        # Chunk i of a text lies on disk as far behind its first as on the device.
        new["source"][chunks] = chunks_of(keys >> _NAMESPACE_BITS, lengths)
        new["documents"] += [len(rows[share]) for share in shares]
        new["chunks"] += [lengths[share].sum() for share in shares]
        longest = int(lengths.max(initial=1))
        if longest > self.max_length:
            new["max_length"] = capacity_for(longest, multiple=1)
        return dataclasses.replace(self, **new)


def origin_of(store: BankReader) -> tuple[str, str]:
    """What chunk numbers of a store mean something in: its place, and the database in use there."""
    return url_of(store.path), store.name


def _key(starts: np.ndarray, namespaces: np.ndarray) -> np.ndarray:
    return (starts << _NAMESPACE_BITS) | namespaces


def _texts(
    store: BankReader, only: Sequence[str] | None, among: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the live texts of the namespaces and rows asked for, ascending, and a live row of each.

    Documents of one text share its chunks: the first row of them stands for all. Nothing is shared across namespaces.
    """
    table = store.table
    rows = table.alive if among is None else among[table.columns[among, ALIVE] == 1]
    rows = rows[table.columns[rows, LENGTH] > 0]
    if only is not None:
        numbers = [number for number, name in enumerate(table.namespaces) if name in set(only)]
        rows = rows[np.isin(table.columns[rows, NAMESPACE], numbers)]
    keys, first = np.unique(_key(table.columns[rows, START], table.columns[rows, NAMESPACE]), return_index=True)
    return keys, rows[first]
