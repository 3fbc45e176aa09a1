"""Which database of a bank is in use, and by whom.

A bank's folder holds the file CURRENT, the databases bank-0/, bank-1/, ..., of which CURRENT names the one in use, and
the locks that its readers share, bank-0.lock, ... `compact` writes the next database, then CURRENT; the one before
goes when its last reader has. NUMBERS counts texts (see `numbers`). On a kvstore that is no file system there are no
locks.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import re
import time

import tensorstore as ts

from msa_jax.bank.database import folder_of, refusing, remove_stale_locks, url_of
from msa_jax.errors import BankError

FIRST = "bank-0"
COUNTER = "NUMBERS"
_WRITER_LOCK, _COUNTER_LOCK = "writer.lock", "numbers.lock"


def current(path: str | pathlib.Path) -> str | None:
    """Name of the database in use; None where there is no bank."""
    with refusing(f"{path}: cannot be read"):
        result = ts.KvStore.open(url_of(path)).result().read("CURRENT").result()
    return None if result.state == "missing" else result.value.decode().strip()


def switch(path: str | pathlib.Path, name: str) -> None:
    """Make another database the one in use, in one step."""
    ts.KvStore.open(url_of(path)).result().write("CURRENT", name.encode()).result()


def following(name: str) -> str:
    """Name of the database that comes after another."""
    return f"bank-{int(name.removeprefix('bank-')) + 1}"


def database_url(path: str | pathlib.Path, name: str) -> str:
    return f"{url_of(path)}{name}/"


def remove(path: str | pathlib.Path, name: str) -> None:
    """Delete a database with all that is in it."""
    ts.KvStore.open(database_url(path, name)).result().delete_range(ts.KvStore.KeyRange()).result()
    if (folder := folder_of(path)) is not None:
        for empty in sorted((folder / name).glob("**/"), reverse=True):
            empty.rmdir()
        (folder / f"{name}.lock").unlink(missing_ok=True)


def sweep(path: str | pathlib.Path, in_use: str, *, keep: str | None = None) -> list[str]:
    """Delete databases that nobody needs: all but the one in use, `keep`, and those that are being read.

    Returns:
      The names of those that readers still hold.
    """
    keys = ts.KvStore.open(url_of(path)).result().list().result()
    names = {key.decode().split("/")[0] for key in keys}
    held = []
    for name in sorted(names):
        if not re.fullmatch(r"bank-\d+", name) or name in (in_use, keep):
            continue
        lock = None if folder_of(path) is None else _flock(path, f"{name}.lock", fcntl.LOCK_EX)
        if folder_of(path) is not None and lock is None:
            held.append(name)
            continue
        remove(path, name)
        release(lock)
    return held


def take_reader_lock(path: str | pathlib.Path, name: str) -> int | None:
    """Keep a database from being deleted; None where there are no locks or the folder cannot be written."""
    try:
        return None if folder_of(path) is None else _flock(path, f"{name}.lock", fcntl.LOCK_SH)
    except BankError:
        return None


def take_writer_lock(path: str | pathlib.Path, *, wait: float = 0.0) -> int | None:
    """Become the one writer, and clear away what the last one was writing when it was killed.

    Args:
      wait: seconds to wait for another writer.

    Raises:
      BankError: another process writes, or the folder cannot be written.
    """
    if (folder := folder_of(path)) is None:
        return None
    until = time.monotonic() + wait
    while (lock := _flock(path, _WRITER_LOCK, fcntl.LOCK_EX)) is None:
        if time.monotonic() >= until:
            raise BankError(f"{path}: another process is writing to this bank: wait until it is done, or stop it.")
        time.sleep(0.05)
    # The counter is written without the writer's lock, and is of one length: see `numbers`.
    remove_stale_locks(folder, *folder.glob("bank-*/"), *folder.glob("bank-*/d/"), but=COUNTER)
    return lock


def take_counter_lock(path: str | pathlib.Path) -> int | None:
    """Keep others from raising the counter, for a moment; waits until nobody else does.

    Raises:
      BankError: the folder cannot be written.
    """
    if folder_of(path) is None:
        return None
    while (lock := _flock(path, _COUNTER_LOCK, fcntl.LOCK_EX)) is None:
        time.sleep(0.001)
    return lock


def release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _flock(path: str | pathlib.Path, name: str, kind: int) -> int | None:
    """A descriptor that holds the lock, or None when another process does."""
    file = folder_of(path) / name
    try:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            # Who may only read can share a lock all the same.
            if kind == fcntl.LOCK_EX:
                raise
            descriptor = os.open(file, os.O_RDONLY)
    except OSError as e:
        raise BankError(f"{path}: cannot be written: {e.strerror}. Mend permissions, or open it for reading.") from e
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
