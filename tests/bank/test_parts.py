"""Several processes encode one corpus: the bank is that of one process, whatever happens to them on the way."""

import concurrent.futures

import pytest

from msa_jax.bank import parts
from msa_jax.bank.manifest import BankError
from msa_jax.bank.parts import add_part, merge
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import BankDocument
from tests.bank.test_ingest_and_load import create, documents, encoder_of
from tests.test_bank_encoder import close

TEXTS = [f"text {i % 11} of some length " * (i % 4 + 1) for i in range(23)]  # some are equal
CORPUS = [*documents(TEXTS[:12]), *documents(TEXTS[12:], "other")]


def contents(path):
    """Every live document with its tokens and routing keys."""
    found = {}
    with MemoryStore(path) as store:
        store.verify()
        for row in store.table.alive:
            start, length, tokens = store.table.columns[row, :3]
            document = store.documents([row])[0]
            keys = store.array("routing_keys")[:, start : start + length].read().result()
            found[document.namespace, document.id] = document, tokens, keys
        return found, store.manifest.chunks


def same(path, other):
    (mine, my_chunks), (others, other_chunks) = contents(path), contents(other)
    assert my_chunks == other_chunks and mine.keys() == others.keys()
    for name, (document, tokens, keys) in mine.items():
        assert (document, tokens) == others[name][:2]
        close(keys, others[name][2])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_make_the_bank_of_one_process(tmp_path, count):
    with create(tmp_path / "one") as store:
        store.add(CORPUS, encoder_of(row_len=128))
    create(tmp_path / "many").close()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        call = lambda i: add_part(tmp_path / "many", iter(CORPUS), encoder_of(row_len=128), index=i, count=count)  # noqa: E731
        reports = list(pool.map(call, range(count)))
    assert sum(r.added for r in reports) == len(CORPUS)
    same(tmp_path / "many", tmp_path / "one")
    assert not list((tmp_path / "many").glob("part-*"))
    # One commit a part, and nothing more to do afterwards.
    assert MemoryStore(tmp_path / "many").version == 1 + count
    again = add_part(tmp_path / "many", CORPUS, encoder_of(row_len=128), index=0, count=1)
    assert (again.added, again.unchanged) == (0, len(CORPUS))


def test_a_part_that_was_stopped_goes_on(tmp_path, monkeypatch):
    create(tmp_path).close()

    def cut():
        yield from CORPUS[:5]
        raise KeyboardInterrupt

    arguments = dict(index=0, count=1, commit_tokens=1)
    with pytest.raises(KeyboardInterrupt):
        add_part(tmp_path, cut(), encoder_of(row_len=128), **arguments)
    assert len(MemoryStore(tmp_path)) == 0 and len(MemoryStore(tmp_path / "part-0-of-1")) == 5

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts, "merge", stopped)
        with pytest.raises(KeyboardInterrupt):
            add_part(tmp_path, CORPUS, encoder_of(row_len=128), **arguments)
    # Killed between copying the chunks and the commit: they are of no version, and are written over.
    with MemoryStore(tmp_path, writable=True) as store, MemoryStore(tmp_path / "part-0-of-1") as part:
        with monkeypatch.context() as patch:
            patch.setattr(parts, "copy_rows", stopped)
            with pytest.raises(KeyboardInterrupt):
                merge(store, part)
        assert len(store) == 0 and store.array("content_k").shape[1] > 0
        store.verify()
        store.add([BankDocument("between", "the two")], encoder_of(row_len=128))
    report = add_part(tmp_path, CORPUS, encoder_of(row_len=128), **arguments)
    assert (report.added, report.unchanged) == (0, len(CORPUS))
    with create(tmp_path / "one") as store:
        store.add([BankDocument("between", "the two"), *CORPUS], encoder_of(row_len=128))
    same(tmp_path, tmp_path / "one")


def test_what_cannot_be_merged_is_refused_whole(tmp_path):
    with create(tmp_path / "a") as store, create(tmp_path / "b") as part:
        store.add(documents(["one", "two"]), encoder_of())
        part.add([BankDocument("new", "text"), BankDocument("default 1", "not two")], encoder_of())
        version = store.version
        with pytest.raises(BankError, match="in .* with another text: `update` it, or rename one"):
            merge(store, part)
        assert store.version == version and store.manifest.chunks == store.array("content_v").shape[1]
        with pytest.raises(BankError, match="part 3 of 3: parts are numbered from 0 to 2"):
            add_part(tmp_path / "a", [], encoder_of(), index=3, count=3)
