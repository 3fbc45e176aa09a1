"""Whether a bank on disk is whole: everything read, and compared with what it should be."""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

from msa_jax.bank.database import refusing
from msa_jax.bank.numbers import next_of
from msa_jax.bank.reader import ARRAYS, BankReader
from msa_jax.bank.table import ID_KEY, LENGTH, NUMBER, START, TEXT_KEY, TOKENS
from msa_jax.errors import BankError

_CHUNKS_AT_ONCE = 4096
_ROWS_AT_ONCE = 1024


def verify(store: BankReader, *, progress: bool = False) -> dict[str, Any]:
    """Read every chunk and text of a bank.

    Returns:
      How many documents, chunks and bytes were found whole.

    Raises:
      BankError: something is damaged, missing or not a number, or texts are numbered wrongly; it is named.
    """
    manifest, table = store.manifest, store.table
    total = 0
    with tqdm(desc="verify", unit="B", unit_scale=True, mininterval=1.0, disable=not progress) as bar:
        for name in ARRAYS:
            array = store.array(name)
            # An interrupted merge leaves chunks behind the last one; they are of no version.
            if array.shape[1] < manifest.chunks:
                raise BankError(f"{store.path}: {name} has {array.shape[1]} chunks, the manifest {manifest.chunks}.")
            for first in range(0, manifest.chunks, _CHUNKS_AT_ONCE):
                place = slice(first, min(manifest.chunks, first + _CHUNKS_AT_ONCE))
                with refusing(f"{store.path}: {name} is damaged at chunks {place.start} to {place.stop}"):
                    values = np.asarray(array[:, place].read().result())
                if not np.isfinite(values.astype(np.float32)).all():
                    raise BankError(f"{store.path}: {name} is not a number at chunks {place.start} to {place.stop}.")
                total += values.nbytes
                bar.update(values.nbytes)
        rows = table.alive
        ends = table.columns[rows, START] + table.columns[rows, LENGTH]
        if (table.columns[rows, START] < 0).any() or (ends > manifest.chunks).any():
            raise BankError(f"{store.path}: a document has chunks that do not exist.")
        if manifest.documents != len(rows) or manifest.tokens != int(table.columns[rows, TOKENS].sum()):
            raise BankError(f"{store.path}: the manifest does not count the documents there are.")
        _verify_numbers(store, table.columns[rows])
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[first : first + _ROWS_AT_ONCE]
            for row, document in zip(part, store.documents(part), strict=True):
                kept = table.columns[row, ID_KEY : TEXT_KEY + 2].tolist()
                if kept != [*document.id_key, *document.text_key]:
                    raise BankError(
                        f"{store.path}: document {document.id!r} is not the one added: its text or id differs."
                    )
                total += len(document.text.encode())
    listed = sum(1 for _ in store.search())
    if listed != len(rows):
        raise BankError(f"{store.path}: {len(rows)} documents have {listed} names.")
    return {"whole": True, "documents": len(rows), "chunks": manifest.chunks, "bytes": total}


def _verify_numbers(store: BankReader, live: np.ndarray) -> None:
    """Of live rows [n, 10]: each text that was encoded has one number, which no other has."""
    next_of(store.path)  # refuses a damaged one
    numbers = np.unique(live[:, NUMBER])
    if len(numbers) and numbers[0] < 1:
        raise BankError(f"{store.path}: a document has no number.")
    if len(numbers) >= store.manifest.next_text:
        raise BankError(f"{store.path}: {len(numbers)} numbers are in use, and fewer were given.")
    # By where it stands: `append` may be told to encode a text again, with another number.
    pairs = np.unique(live[:, [NUMBER, START]], axis=0)
    twice = np.flatnonzero(np.diff(pairs[:, 0]) == 0)
    if len(twice):
        raise BankError(f"{store.path}: two texts have number {pairs[twice[0], 0]}.")
    if len(np.unique(pairs[:, 1])) != len(pairs):
        raise BankError(f"{store.path}: a text has two numbers.")
