"""Which texts of a bank were numbered: a counter beside its databases, which several processes may raise at once.

Texts are counted from 1 on, in the order in which they are taken, and no ordinal is given twice, whatever becomes of
the text. The counter is the key NUMBERS of the bank's folder. It is raised before a text is encoded, as its number is
encoded with it, and apart from commits, so that the parts of a corpus (see `parts`) need not wait for a writer.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import zlib
from collections.abc import Callable

import tensorstore as ts

from msa_jax.bank import folder
from msa_jax.bank.database import reason_of, refusing, url_of
from msa_jax.errors import BankError

_COUNTER, _RECORD = folder.COUNTER, "CLAIMED"
# Besides what is asked for, a claim takes this part of what was taken so far: claims become rare, and waste is small.
_AHEAD = 8


class Numbers:
    """Ordinals for the texts that one call encodes."""

    def __init__(self, bank: str | pathlib.Path, least: int, *, part: str | pathlib.Path | None = None, after: int = 0):
        """Begin to take ordinals of a bank.

        Args:
          bank: where the counter is.
          least: `Manifest.next_text` of the bank; no ordinal below it is given, if the counter is lost.
          part: where to keep what was taken, so that a call which was stopped goes on with it.
          after: the last ordinal that the part has committed.
        """
        self._bank, self._least, self._part = bank, least, part
        self._blocks = [] if part is None else _recorded(part)
        self._last, self._taken = after, sum(max(0, min(end, after + 1) - first) for first, end in self._blocks)

    def take(self, count: int) -> list[int]:
        """The next `count` ordinals, ascending.

        Raises:
          BankError: the counter cannot be read or written.
        """
        free = sum(end - max(first, self._last + 1) for first, end in self._blocks if end > self._last)
        if free < count:
            self.claim(max(count - free, self._taken // _AHEAD))
        ordinals = (n for first, end in self._blocks for n in range(max(first, self._last + 1), end))
        taken = list(itertools.islice(ordinals, count))
        self._taken += count
        self._last = taken[-1] if taken else self._last
        return taken

    def give_back(self, next_text: int) -> None:
        """Return what no commit has, from `next_text` on, unless others have taken ordinals since."""
        if self._blocks and next_text < self._blocks[-1][1]:
            first, end = self._blocks.pop()
            _exchange(self._bank, lambda found: max(first, next_text) if found == end else None)

    def claim(self, count: int) -> None:
        first = max(self._least, _exchange(self._bank, lambda found: max(found, self._least) + count))
        end = first + count
        if self._blocks and self._blocks[-1][1] == first:
            self._blocks[-1][1] = end
        else:
            self._blocks.append([first, end])
        if self._part is not None:
            with refusing(f"{self._part}: cannot be written"):
                ts.KvStore.open(url_of(self._part)).result().write(_RECORD, json.dumps(self._blocks).encode()).result()


def next_of(bank: str | pathlib.Path) -> int:
    """The counter of a bank; 1 where there is none.

    Raises:
      BankError: it is damaged, or cannot be read.
    """
    return _exchange(bank, lambda found: None)


def _exchange(bank: str | pathlib.Path, change: Callable[[int], int | None]) -> int:
    """Set the counter to what `change` makes of it, as one step; None leaves it. Returns what it was."""
    lock = None
    try:
        with refusing(f"{bank}: cannot be written"):
            store = ts.KvStore.open(url_of(bank)).result()
            while True:
                read = store.read(_COUNTER).result()
                found = 1 if read.state == "missing" else _parse(bytes(read.value), f"{bank}/{_COUNTER}")
                value = change(found)
                if value is None:
                    return found
                if lock is None and (lock := folder.take_counter_lock(bank)) is not None:
                    continue  # it may have been raised before the lock was there
                # An empty generation says that somebody else was first.
                if store.write(_COUNTER, _written(value), if_equal=read.stamp.generation).result().generation:
                    return found
    finally:
        folder.release(lock)


def _written(value: int) -> bytes:
    """Of one length always: what was half written and left behind is written over whole."""
    digits = f"{value:020d}"
    return f"{digits} {zlib.crc32(digits.encode()):08x}\n".encode()


def _parse(raw: bytes, where: str) -> int:
    try:
        value = int(raw[:20])
    except ValueError:
        value = -1
    if value < 1 or raw != _written(value):
        raise BankError(f"{where} is damaged: delete it while nothing is being added; it is made anew.")
    return value


def _recorded(part: str | pathlib.Path) -> list[list[int]]:
    try:
        read = ts.KvStore.open(url_of(part)).result().read(_RECORD).result()
        return [] if read.state == "missing" else json.loads(read.value)
    except (ValueError, OSError) as e:
        raise BankError(f"{part}: {_RECORD} is damaged ({reason_of(e)}): delete the part, and add it anew.") from e
