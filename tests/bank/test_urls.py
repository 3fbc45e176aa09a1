"""A bank at a kvstore URL is used as one in a folder; there, nothing can hold a lock."""

import pytest

from msa_jax.bank.numbers import next_of
from msa_jax.bank.parts import add_part
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import BankDocument
from msa_jax.errors import BankError
from tests.bank.object_store import serving
from tests.bank.test_ingest_and_load import create, documents, encoder_of, load, same_bank
from tests.bank.test_store import SPEC, check, put


@pytest.fixture(params=["file", "gs"])
def url(request, tmp_path, monkeypatch):
    if request.param == "file":
        yield f"file://{tmp_path}/bank"
        return
    with serving(monkeypatch):
        yield "gs://bucket/some/bank"


def test_a_bank_lives_at_a_url(url):
    with pytest.raises(BankError, match="no bank here"):
        MemoryStore(url)
    with MemoryStore.create(url, SPEC) as store:
        put(store, [BankDocument("a", "one"), BankDocument("b", "two"), BankDocument("c", "three")])
        put(store, [BankDocument("a", "changed")], "replace")
        store.delete(["b"])
    with pytest.raises(BankError, match="there is a bank already"):
        MemoryStore.create(url, SPEC)
    live = {("default", "a"): BankDocument("a", "changed"), ("default", "c"): BankDocument("c", "three")}
    reader = MemoryStore(url)
    check(reader, live)
    assert MemoryStore(url, version=2).get("b").text == "two"
    reader.verify()
    with MemoryStore.open(url, writable=True) as store:
        # What readers hold at an object store is not known: the database before stays until the next compaction.
        store.compact()
        check(store, live)
        check(reader, live)
        store.compact()
        check(store, live)
    check(MemoryStore(url), live)
    assert [m.operation for m in MemoryStore(url).versions()] == ["compact"]


def test_documents_are_encoded_into_a_url_in_parts(url):
    texts = ["one", "a second text", "three, and a bit longer", "x", "five"]
    create(url).close()
    for index in range(2):
        add_part(url, documents(texts), encoder_of(), index=index, count=2)
    with MemoryStore(url) as store:
        assert store.version == 3
        same_bank(load(store), [texts[0], texts[2], texts[4], texts[1], texts[3]])
        assert next_of(url) == store.manifest.next_text == 6
        store.verify()
