"""`MemoryStore`: what is committed is there, at every version, and nothing else; one writer; clear refusals."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from msa_jax.bank.change import Encoded
from msa_jax.bank.compaction import compact
from msa_jax.bank.manifest import BankSpec
from msa_jax.bank.reader import ARRAYS
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import LENGTH, START, BankDocument
from msa_jax.errors import BankError

SPEC = BankSpec(
    "of a model", "of a tokenizer", chunk_size=16, layers=2, width=6, kv_heads=2, head_dim=3, dtype="bfloat16"
)


def encoded(texts, first=1):
    """Chunks that tell which text they are of: their values are drawn from it. Numbers count from `first`."""
    lengths = np.array([1 + len(text) % 4 for text in texts], np.int64)
    parts = {name: [] for name in ARRAYS}
    for text, length in zip(texts, lengths, strict=True):
        rng = np.random.default_rng(list(text.encode()))
        for name, rest in (("routing_keys", (6,)), ("content_k", (2, 3)), ("content_v", (2, 3))):
            parts[name].append(rng.normal(size=(2, length, *rest)).astype(ml_dtypes.bfloat16))
    joined = {
        name: np.concatenate(p, axis=1) if p else np.zeros((2, 0, 6) if name == "routing_keys" else (2, 0, 2, 3))
        for name, p in parts.items()
    }
    ordinals = first + np.arange(len(texts))
    return Encoded(**joined, lengths=lengths, tokens=lengths * 16 - 3, ordinals=ordinals, numbers=ordinals)


def put(store, documents, change="append"):
    chunks = encoded([d.text for d in documents], store.manifest.next_text)
    getattr(store, change)(documents, chunks, range(len(documents)))


def check(store, wanted):
    """The live documents of a store are `wanted`, with their chunks."""
    assert len(store) == len(wanted)
    assert {(d.namespace, d.id): d for d in store.documents(store.table.alive)} == wanted
    arrays = {name: np.asarray(store.array(name).read().result()) for name in ARRAYS}
    for row in store.table.alive:
        start, length = store.table.columns[row, [START, LENGTH]]
        want = encoded([store.documents([row])[0].text])
        for name in ARRAYS:
            np.testing.assert_array_equal(arrays[name][:, start : start + length], getattr(want, name))


def test_documents_come_back_as_they_went_in(tmp_path):
    documents = [
        BankDocument("a", "hello", title="A title"),
        BankDocument("b", "wörld\n" * 50, namespace="mine", metadata={"page": 3, "of": ["x", None]}),
    ]
    with MemoryStore.create(tmp_path / "bank", SPEC) as store:
        put(store, documents)
        assert list(store.search("a")) == [("default", "a")] and list(store.search(namespace="mine")) == [("mine", "b")]
    with MemoryStore(tmp_path / "bank") as store:
        assert store.get("a") == documents[0] and store.get("b", "mine") == documents[1]
        assert store.manifest.tokens == sum(encoded([d.text for d in documents]).tokens)
        check(store, {(d.namespace, d.id): d for d in documents})
        with pytest.raises(KeyError, match="no document 'b' in namespace 'default'"):
            store.get("b")


def test_a_text_held_already_takes_no_room_and_keeps_its_own_id(tmp_path):
    with MemoryStore.create(tmp_path, SPEC) as store:
        put(store, [BankDocument("first", "same")])
        row = store.table.row_with(BankDocument("second", "same").text_key)
        store.append([BankDocument("second", "same")], encoded([]), [-1 - row])
        assert store.manifest.chunks == 1 + len("same") % 4 and store.get("second").text == "same"
        store.delete(["first"])
        assert store.get("second").text == "same"
        assert store.table.row_with(BankDocument("x", "same").text_key) == 1


def test_readers_see_the_version_they_opened(tmp_path):
    with MemoryStore.create(tmp_path, SPEC) as writer:
        put(writer, [BankDocument("a", "one"), BankDocument("b", "two")])
        reader = MemoryStore(tmp_path)
        put(writer, [BankDocument("a", "changed")], "replace")
        writer.delete(["b"])
        assert reader.get("a").text == "one" and reader.get("b").text == "two" and reader.version == 2
        assert [(m.version, m.operation, m.documents) for m in writer.versions()] == [
            (1, "create", 0), (2, "add", 2), (3, "update", 2), (4, "delete", 1),
        ]  # fmt: skip
        assert MemoryStore(tmp_path, version=3).get("a").text == "changed"
        assert list(MemoryStore(tmp_path).search()) == [("default", "a")]


def test_any_of_many_versions_opens(tmp_path):
    with MemoryStore.create(tmp_path, SPEC) as store:
        for i in range(50):
            put(store, [BankDocument(str(i), f"text {i}")])
        assert [m.documents for m in store.versions()] == list(range(51))
        assert [m.version for m in store.versions(last=3)] == [49, 50, 51]
    for version in (1, 2, 19, 50, 51):
        assert len(MemoryStore(tmp_path, version=version)) == version - 1


def test_arrays_that_are_held_do_not_hinder_a_writer(tmp_path):
    with MemoryStore.create(tmp_path, SPEC) as store:
        held = []
        for i in range(5):
            put(store, [BankDocument(str(i), f"text {i}" * (i + 1))])
            held.append(store.array("content_k"))
            assert held[-1].shape[1] == store.manifest.chunks
        held[0].read().result()


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=9)
names = st.sampled_from("abcd")
spaces = st.sampled_from(["default", "other"])


class AnyHistory(RuleBasedStateMachine):
    """Whatever is done in whatever order, the bank holds what a dictionary would, at every version."""

    @initialize()
    def make(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = MemoryStore.create(self.folder.name, SPEC)
        self.model = {}
        self.history = {1: {}}

    def _done(self):
        self.history[self.store.version] = dict(self.model)

    @rule(name=names, space=spaces, text=texts)
    def put(self, name, space, text):
        document = BankDocument(name, text, namespace=space)
        put(self.store, [document], "replace" if (space, name) in self.model else "append")
        self.model[space, name] = document
        self._done()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data):
        space, name = data.draw(st.sampled_from(sorted(self.model)))
        assert self.store.delete([name], space) == 1
        del self.model[space, name]
        self._done()

    @rule(name=names)
    def delete_what_is_not_there(self, name):
        before = self.store.version
        with pytest.raises(BankError, match="nothing was changed"):
            self.store.delete([name, "never there"])
        assert self.store.version == before

    @rule()
    def compact(self):
        compact(self.store)
        assert self.store.manifest.rows == len(self.model)
        self.history = {self.store.version: dict(self.model)}

    @rule()
    def reopen(self):
        self.store.close()
        self.store = MemoryStore(self.folder.name, writable=True)

    @rule(data=st.data())
    def look_back(self, data):
        version = data.draw(st.sampled_from(sorted(self.history)))
        check(MemoryStore(self.folder.name, version=version), self.history[version])

    @invariant()
    def holds_what_it_should(self):
        if hasattr(self, "store"):
            check(self.store, self.model)

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=12, stateful_step_count=12)


def test_one_writer_at_a_time(tmp_path):
    with MemoryStore.create(tmp_path, SPEC):
        with pytest.raises(BankError, match="another process is writing to this bank: wait"):
            MemoryStore(tmp_path, writable=True)
        reader = MemoryStore(tmp_path)
    with pytest.raises(BankError, match="opened for reading: open it with writable=True"):
        put(reader, [BankDocument("a", "b")])
    MemoryStore(tmp_path, writable=True).close()


def test_bad_places_and_versions_are_named(tmp_path):
    with pytest.raises(BankError, match="no bank here: make one"):
        MemoryStore(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    MemoryStore.create(tmp_path / "bank", SPEC).close()
    with pytest.raises(BankError, match="there is a bank already"):
        MemoryStore.create(tmp_path / "bank", SPEC)
    with pytest.raises(BankError, match="no version 7: `stats` lists"):
        MemoryStore(tmp_path / "bank", version=7)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BankError, match="cannot be"):
        MemoryStore.create(tmp_path / "file" / "bank", SPEC)
    other = dataclasses.replace(SPEC, fingerprint="of another", width=8)
    with pytest.raises(BankError, match="made by another model .*width 6 here, 8 there"):
        MemoryStore(tmp_path / "bank").spec.require_same(other, "bank")
