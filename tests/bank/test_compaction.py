"""`compact`: what is dead goes, what lives stays, readers are not disturbed, and a stop at any point harms nothing."""

import pathlib

import numpy as np
import pytest

from msa_jax.bank import compaction, copying, folder
from msa_jax.bank.compaction import compact
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import BankDocument
from msa_jax.errors import BankError
from tests.bank.test_store import SPEC, check, put


def filled(path):
    """A bank open for writing in which much was changed, and what it should hold."""
    store = MemoryStore.create(path, SPEC)
    documents = [BankDocument(str(i), f"text {i}" * (i % 5 + 1), namespace=f"space {i % 3}") for i in range(30)]
    put(store, documents)
    store.delete([str(i) for i in range(0, 30, 3)], "space 0")
    put(store, [BankDocument("4", "changed", namespace="space 1")], "replace")
    row = store.table.row_with(documents[5].text_key)
    shared = BankDocument("shares", documents[5].text, namespace="space 2")
    store.append([shared], store_nothing(), [-1 - row])
    live = {(d.namespace, d.id): d for d in [*documents[1::3], *documents[2::3], shared]}
    return store, live | {("space 1", "4"): BankDocument("4", "changed", namespace="space 1")}


def store_nothing():
    from tests.bank.test_store import encoded

    return encoded([])


@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 26])
def test_what_lives_stays_and_what_is_dead_goes(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(copying, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(copying, "_ROWS_AT_ONCE", 7)
    store, live = filled(tmp_path)
    before = store.manifest
    with store:
        report = compact(store)
        check(store, live)
        distinct = {(d.namespace, d.text): 1 + len(d.text) % 4 for d in live.values()}
        assert store.manifest.chunks == sum(distinct.values()) == report["chunks"] < before.chunks
        assert store.manifest.rows == len(live) and store.manifest.tokens == before.tokens
        assert report["chunks_removed"] == before.chunks - store.manifest.chunks
        assert report["rows_removed"] == before.rows - len(live)
        # The only version there is, one later than the last; names without documents are gone.
        assert [m.version for m in store.versions()] == [before.version + 1]
        assert sorted(store.manifest.namespaces) == ["space 1", "space 2"]
        assert sorted(store.search()) == sorted(live)
        store.verify()
        put(store, [BankDocument("after", "compaction")])
    check(MemoryStore(tmp_path), live | {("default", "after"): BankDocument("after", "compaction")})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CURRENT", "bank-1", "bank-1.lock", "writer.lock"]


def test_an_empty_bank_can_be_compacted(tmp_path):
    with MemoryStore.create(tmp_path, SPEC) as store:
        put(store, [BankDocument("a", "b")])
        store.delete(["a"])
        assert compact(store)["chunks"] == 0
        put(store, [BankDocument("a", "c")])
        check(store, {("default", "a"): BankDocument("a", "c")})


def test_a_reader_of_the_old_database_keeps_it(tmp_path):
    store, live = filled(tmp_path)
    with store:
        reader = MemoryStore(tmp_path)
        assert compact(store)["still_read"] == ["bank-0"]
        check(reader, live)
        reader.close()
        assert compact(store)["still_read"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CURRENT", "bank-2", "bank-2.lock", "writer.lock"]


def test_a_reader_that_opens_while_the_bank_is_switched_gets_the_new_one(tmp_path, monkeypatch):
    store, live = filled(tmp_path)
    take = folder.take_reader_lock

    def late(path, name):
        monkeypatch.setattr(folder, "take_reader_lock", take)
        compact(store)  # after the reader learned the name, before it holds the lock
        return take(path, name)

    with store:
        monkeypatch.setattr(folder, "take_reader_lock", late)
        reader = MemoryStore(tmp_path)
        assert reader.name == "bank-1"
        check(reader, live)


@pytest.mark.parametrize("where", ["copy_chunks", "copy_rows", "commit"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("NOT OK: disk is full")])
def test_a_failure_leaves_the_bank_as_it_was(tmp_path, monkeypatch, where, error):
    store, live = filled(tmp_path)
    version = store.version

    def fails(*_, **__):
        raise error

    with store:
        with monkeypatch.context() as patch:
            patch.setattr(compaction, where, fails)
            with pytest.raises(BankError if isinstance(error, ValueError) else KeyboardInterrupt):
                compact(store)
        assert not (tmp_path / "bank-1").exists() and store.version == version
        check(store, live)
        compact(store)
        check(store, live)


def test_an_interrupt_just_after_the_switch_keeps_the_new_one(tmp_path, monkeypatch):
    store, live = filled(tmp_path)
    switch = folder.switch

    def interrupted(path, name):
        switch(path, name)
        raise KeyboardInterrupt

    with store:
        monkeypatch.setattr(folder, "switch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compact(store)
    with MemoryStore(tmp_path) as store:
        assert store.name == "bank-1"
        check(store, live)


def test_what_a_killed_compaction_left_is_swept(tmp_path):
    store, live = filled(tmp_path)
    (tmp_path / "bank-1" / "d").mkdir(parents=True)
    (tmp_path / "bank-1" / "d" / "half").write_bytes(b"written")
    with store:
        compact(store)
        check(store, live)
    assert not list(pathlib.Path(tmp_path).glob("**/half"))


def test_damaged_chunks_are_named_and_not_copied(tmp_path):
    store, _ = filled(tmp_path)
    with store:
        for file in (tmp_path / "bank-0" / "d").iterdir():
            data = np.frombuffer(file.read_bytes(), np.uint8).copy()
            data[len(data) // 2] ^= 0x10
            file.write_bytes(data.tobytes())
        store.database = type(store.database)(store.database.url)  # nothing cached
        with pytest.raises(BankError):
            compact(store)
        assert not (tmp_path / "bank-1").exists()
    with pytest.raises(BankError, match="opened for reading"):
        compact(store)
