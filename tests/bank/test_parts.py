"""Several processes encode one corpus: the bank is that of one process, whatever happens to them on the way."""

import concurrent.futures

import pytest

from msa_jax.bank import parts
from msa_jax.bank.parts import add_part, merge
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import NUMBER, PLACE, BankDocument
from msa_jax.errors import BankError
from tests.bank.drawn import create, rendered
from tests.bank.test_bank_encoder import close
from tests.bank.test_ingest_and_load import direct, documents, encoder_of

TEXTS = [f"text {i % 11} of some length " * (i % 4 + 1) for i in range(23)]  # some are equal
CORPUS = [*documents(TEXTS[:12]), *documents(TEXTS[12:], "other")]


def numbers_of(path):
    """The number of each live document."""
    with MemoryStore(path) as store:
        rows = store.table.alive
        named = zip(store.documents(rows), store.table.columns[rows, NUMBER].tolist(), strict=True)
        return {(d.namespace, d.id): number for d, number in named}


def holds(path, documents):
    """A bank has these documents, every text once in a namespace, encoded with a number of its own."""
    want = {(d.namespace, d.id): d for d in documents}
    with MemoryStore(path) as store:
        store.verify()
        rows = store.table.alive
        assert {(d.namespace, d.id): d for d in store.documents(rows)} == want
        places = store.table.columns[rows][:, PLACE].tolist()
        by_text = {}
        for document, place in zip(store.documents(rows), places, strict=True):
            assert by_text.setdefault((document.namespace, document.text), place) == place
        texts, places = zip(*by_text.items(), strict=True)
        numbers = [number for *_, number in places]
        assert len(set(numbers)) == len(numbers) and max(numbers) < store.manifest.next_text
        assert sum(length for _, length, *_ in places) == store.manifest.chunks
        bank = direct([text for _, text in texts], numbers, row_len=128)
        at = 0
        for (_, text), (start, length, tokens, number) in zip(texts, places, strict=True):
            assert tokens == len(rendered(text, number))
            keys = store.array("routing_keys")[:, start : start + length].read().result()
            close(keys, bank.routing_keys[:, at : at + length])
            at += length


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_make_the_bank_of_one_process(tmp_path, count):
    create(tmp_path / "many").close()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        call = lambda i: add_part(tmp_path / "many", iter(CORPUS), encoder_of(row_len=128), index=i, count=count)  # noqa: E731
        reports = list(pool.map(call, range(count)))
    assert sum(r.added for r in reports) == len(CORPUS)
    holds(tmp_path / "many", CORPUS)
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
    given = numbers_of(tmp_path / "part-0-of-1")

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
    holds(tmp_path, [BankDocument("between", "the two"), *CORPUS])
    assert given.items() <= numbers_of(tmp_path).items()


def test_parts_come_in_any_order_with_changes_between(tmp_path, monkeypatch):
    """Parts 0 and 2 are stopped before their merge; the bank goes on meanwhile, and forgets some of what it had."""
    create(tmp_path).close()
    encoder = encoder_of(row_len=128)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts, "merge", stopped)
        for index in (0, 2):
            with pytest.raises(KeyboardInterrupt):
                add_part(tmp_path, CORPUS, encoder, index=index, count=3, commit_tokens=100)
    given = {i: numbers_of(tmp_path / f"part-{i}-of-3") for i in (0, 2)}
    between = [BankDocument(f"between {i}", f"the two {i}") for i in range(9)]
    with MemoryStore(tmp_path, writable=True) as store:
        store.add([*between, BankDocument("held", TEXTS[0])], encoder)
        store.delete([d.id for d in between])
        store.compact()
        known = store.table.columns[store.table.row_of(BankDocument("held", "").id_key), NUMBER]
    for index in (1, 2, 0):
        add_part(tmp_path, CORPUS, encoder, index=index, count=3)
    holds(tmp_path, [BankDocument("held", TEXTS[0]), *CORPUS])
    numbers = numbers_of(tmp_path)
    # A text has the number that it came with first.
    want = {("default", TEXTS[0]): known}
    for index in (1, 2, 0):
        for d in CORPUS[index::3]:
            came_with = given.get(index, numbers)[d.namespace, d.id]
            assert numbers[d.namespace, d.id] == want.setdefault((d.namespace, d.text), came_with)


def test_what_cannot_be_merged_is_refused_whole(tmp_path):
    with create(tmp_path / "a") as store, create(tmp_path / "b") as part:
        store.add(documents(["one", "two"]), encoder_of())
        part.add([BankDocument("new", "text")], encoder_of())
        version = store.version
        with pytest.raises(BankError, match="number 1 is another text's, .*: add these documents with `add`"):
            merge(store, part)
        part.add([BankDocument("default 1", "not two")], encoder_of())
        with pytest.raises(BankError, match="in .* with another text: `update` it, or rename one"):
            merge(store, part)
        assert store.version == version and store.manifest.chunks == store.array("content_v").shape[1]
        with pytest.raises(BankError, match="part 3 of 3: parts are numbered from 0 to 2"):
            add_part(tmp_path / "a", [], encoder_of(), index=3, count=3)
