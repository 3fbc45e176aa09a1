"""One corpus encoded by several processes: each its own part, in a bank of its own, then one commit into the bank."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterable, Iterator

import numpy as np
import tensorstore as ts

from msa_jax.bank import folder
from msa_jax.bank.copying import copy_chunks, copy_rows, moved
from msa_jax.bank.document_encoder import DocumentEncoder
from msa_jax.bank.ingest import Report, ingest
from msa_jax.bank.numbers import Numbers
from msa_jax.bank.reader import BankReader
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import ID_KEY, NUMBER, PLACE, TEXT_KEY, BankDocument, Key
from msa_jax.errors import BankError

_WAIT_SECONDS = 24 * 3600.0


def add_part(
    path: str | pathlib.Path,
    documents: Iterable[BankDocument],
    encoder: DocumentEncoder,
    *,
    index: int,
    count: int,
    commit_tokens: int | None = None,
    progress: bool = False,
    total: int | None = None,
) -> Report:
    """Add every `count`-th document, from document `index` on: the same call in `count` processes adds them all.

    A process collects its part in a bank of its own within the bank's folder, where an interrupted call goes on, and
    adds it in one commit at the end, waiting for others that do. Texts are numbered while they are encoded, by the
    bank's counter: no two processes give the same number, and a call that goes on keeps those it gave.

    Args:
      path: of a bank that nobody need have open.
      documents: the whole corpus, the same in every process.
      index, count: this process and how many there are, `jax.process_index()` and `jax.process_count()` for example.
      commit_tokens, progress, total: as in `add`; `total` is of the whole corpus.

    Raises:
      BankError: as `add`. What was encoded until then is not lost.
    """
    if not 0 <= index < count:
        raise BankError(f"part {index} of {count}: parts are numbered from 0 to {count - 1}.")
    place = f"{str(path).rstrip('/')}/part-{index}-of-{count}"
    with MemoryStore(path) as store:
        store.spec.require_same(encoder.spec, str(path))
        exists = folder.current(place) is not None
        opened = MemoryStore(place, writable=True) if exists else MemoryStore.create(place, store.spec)
        with opened as part:
            there = [0]
            mine = _new(store, (d for i, d in enumerate(documents) if i % count == index), there)
            share = None if total is None else -(-(total - index) // count)
            numbers = Numbers(path, store.manifest.next_text, part=place, after=part.manifest.next_text - 1)
            options = dict(replace=False, commit_tokens=commit_tokens, progress=progress, total=share)
            report = ingest(part, mine, encoder, numbers, **options)
            report.unchanged += there[0]
    with MemoryStore(path, writable=True, wait=_WAIT_SECONDS) as store, MemoryStore(place) as part:
        merge(store, part, progress=progress)
    if (local := folder.folder_of(place)) is not None:
        shutil.rmtree(local)
    else:
        ts.KvStore.open(f"{place}/").result().delete_range(ts.KvStore.KeyRange()).result()
    return report


def merge(store: MemoryStore, part: BankReader, *, progress: bool = False) -> int:
    """Add the documents of a bank whose texts were numbered for this one, in one commit, without encoding anything.

    Documents that are there already with the same text are passed over; texts that are there are not copied, and keep
    their number.

    Args:
      store: open for writing.
      part: of the same model; its numbers are of `Numbers` of `store`.
      progress: show a progress bar of chunks.

    Returns:
      How many documents were added.

    Raises:
      BankError: another model's bank, an id that is there with another text, or a number that a text of the bank
        has or had; nothing is added then.
    """
    store.spec.require_same(part.spec, str(store.path))
    rows = part.table.alive
    columns = part.table.columns[rows]
    fresh = np.array([not _holds(store, *_keys(row), what=str(part.path)) for row in columns], bool)
    rows, columns = rows[fresh], columns[fresh]
    held = [store.table.row_with(_keys(row)[1]) for row in columns]
    new = np.array([row is None for row in held], bool)
    given = np.isin(columns[new, NUMBER], store.table.columns[:, NUMBER])
    if given.any():
        raise BankError(
            f"{part.path}: in {store.path} number {columns[new, NUMBER][given][0]} is another text's, and a number is "
            "encoded with its text: add these documents with `add`."
        )
    first = store.manifest.chunks
    places = np.zeros((len(rows), len(PLACE)), np.int64)
    chunks, places[new] = moved(columns[new], first)
    places[~new] = store.table.columns[[row for row in held if row is not None]][:, PLACE]
    copy_chunks(part, chunks, store.database, first, title="merge", progress=progress)
    if len(rows):
        with store.change("add") as change:
            change.chunks += len(chunks)
            change.next_text = max(change.next_text, part.manifest.next_text)
            copy_rows(part, rows, places, change)
    return len(rows)


def _keys(row: np.ndarray) -> tuple[Key, Key]:
    return tuple(row[ID_KEY : ID_KEY + 2].tolist()), tuple(row[TEXT_KEY : TEXT_KEY + 2].tolist())


def _holds(store: BankReader, id_key: Key, text_key: Key, *, what: str) -> bool:
    """Whether a bank has a document with that text under that id."""
    row = store.table.row_of(id_key)
    if row is None:
        return False
    if _keys(store.table.columns[row])[1] != text_key:
        raise BankError(f"{what}: a document is in {store.path} with another text: `update` it, or rename one.")
    return True


def _new(store: BankReader, documents: Iterable[BankDocument], there: list[int]) -> Iterator[BankDocument]:
    """Documents that a bank does not have; `there` counts the others."""
    for document in documents:
        if _holds(store, document.id_key, document.text_key, what=f"document {document.id!r}"):
            there[0] += 1
        else:
            yield document
