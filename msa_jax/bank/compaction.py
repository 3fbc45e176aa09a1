"""`compact`: a bank without what was deleted from it, and without its earlier versions."""

from __future__ import annotations

import dataclasses
from typing import Any

from msa_jax.bank import folder
from msa_jax.bank.change import commit, make_database
from msa_jax.bank.copying import blocks, copy_chunks, copy_rows, moved
from msa_jax.bank.writer import BankWriter
from msa_jax.errors import BankError


def compact(store: BankWriter, *, progress: bool = False) -> dict[str, Any]:
    """Reclaim the place of deleted documents and of earlier versions, which cannot be opened any more.

    The live documents are copied into a new database, which takes the place of the old one in one step; killed
    before that, the bank is as it was. The old one is deleted unless readers hold it: then the next `compact` does.
    Needs room on disk for both.

    Args:
      store: open for writing; it shows the new database afterwards.
      progress: show a progress bar of chunks.

    Returns:
      The version, and how many chunks and documents went.

    Raises:
      BankError: opened for reading; damaged chunks or texts; no room. The bank is as it was then.
    """
    store.require_writable()
    path, old, before = store.path, store.name, store.manifest
    name, version = folder.following(old), before.version + 1
    folder.sweep(path, old)  # of a `compact` that was killed, and what readers have left since
    rows = store.table.alive
    chunks, places = moved(store.table.columns[rows], 0)
    empty = dict(chunks=0, rows=0, documents=0, tokens=0, namespaces=())
    manifest = dataclasses.replace(before, version=version, operation="compact", **empty)
    try:
        database = make_database(folder.database_url(path, name), manifest)
        copy_chunks(store, chunks, database, 0, title="compact", progress=progress)
        manifest = dataclasses.replace(manifest, chunks=len(chunks))
        for part in blocks(rows):
            with commit(database, manifest, version, "compact") as change:
                copy_rows(store, rows[part], places[part], change)
            manifest = change.manifest(version, "compact")
        if not len(rows):
            with commit(database, manifest, version, "compact"):
                pass
        folder.switch(path, name)
    except BaseException as e:
        if folder.current(path) != name:
            folder.remove(path, name)
        if isinstance(e, ValueError | OSError) and not isinstance(e, BankError):
            raise BankError(f"{path}: not compacted, the bank is as it was: {e}") from e
        raise
    store.refresh()
    held = folder.sweep(path, name, keep=None if folder.folder_of(path) is not None else old)
    return {
        "version": version,
        "documents": len(rows),
        "chunks": len(chunks),
        "chunks_removed": before.chunks - len(chunks),
        "rows_removed": before.rows - len(rows),
        "still_read": held,
    }
