"""Chunks and rows from one bank's database to another's, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from msa_jax.bank.change import Change
from msa_jax.bank.database import Database, refusing
from msa_jax.bank.reader import ARRAYS, BankReader
from msa_jax.bank.table import LENGTH, NAMESPACE, PLACE, START, body_key, unpack
from msa_jax.memory.places import behind, chunks_of

_BLOCK_BYTES = 1 << 26
_ROWS_AT_ONCE = 8192


def moved(columns: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the chunks of documents go when they are put together from chunk `first` on.

    Args:
      columns: rows [n, 10]; several may share chunks.

    Returns:
      The chunks to copy, in order, and the new PLACE [n, 4] of every row.
    """
    starts, one = np.unique(columns[:, START], return_index=True)
    lengths = columns[one, LENGTH]
    places = columns[:, PLACE]
    places[:, 0] = behind(lengths, first)[np.searchsorted(starts, columns[:, START])]
    return chunks_of(starts, lengths), places


def copy_chunks(
    source: BankReader, chunks: np.ndarray, target: Database, first: int, *, title: str, progress: bool
) -> None:
    """Copy chunks to `first` and following of another database, which no version of it shows until a manifest does.

    Args:
      chunks: numbers in `source`.
      title: of the progress bar of chunks; progress: show it.

    Raises:
      BankError: `source` is damaged, or `target` cannot be written.
    """
    block = max(1, _BLOCK_BYTES // source.spec.bytes_per_chunk)
    bar = tqdm(desc=title, unit="chunk", unit_scale=True, total=len(chunks), mininterval=1.0, disable=not progress)
    for begin in range(0, len(chunks), block):
        numbers = chunks[begin : begin + block]
        run = slice(numbers[0], numbers[-1] + 1) if numbers[-1] - numbers[0] + 1 == len(numbers) else numbers
        with refusing(f"{source.path}: chunks {numbers[0]} to {numbers[-1]} are damaged"):
            pending = {name: source.array(name)[:, run].read() for name in ARRAYS}
            values = {name: np.asarray(read.result()) for name, read in pending.items()}
        with target.commit() as transaction:
            for name, value in values.items():
                target.put(name, value, first + begin, 1, transaction)
        bar.update(len(numbers))


def copy_rows(source: BankReader, rows: np.ndarray, places: np.ndarray, change: Change) -> None:
    """Add rows of a bank to another one under `change`, with new PLACEs [n, 4]."""
    for part in blocks(rows):
        bodies = source.database.read_many([body_key(row) for row in rows[part]])
        columns = source.table.columns[rows[part]].copy()
        columns[:, PLACE] = places[part]
        names = source.table.namespaces
        columns[:, NAMESPACE] = [change.number_of(names[number]) for number in columns[:, NAMESPACE]]
        change.add(columns, [unpack(body)[0] for body in bodies], bodies)


def blocks(rows: Sequence[int]) -> Iterator[slice]:
    """Slices of rows that are handled at once."""
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        yield slice(begin, begin + _ROWS_AT_ONCE)
