"""A bank on the device follows its store: as if loaded anew, at the cost of what is new, compiling nothing."""

import contextlib
import dataclasses
import logging

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax.bank import change, transfer
from msa_jax.bank.loading import load
from msa_jax.bank.quantization import quantize_content, quantize_keys
from msa_jax.bank.store import MemoryStore
from msa_jax.errors import BankError
from msa_jax.sharding import MeshConfig
from tests.bank.drawn import L, chunks_of, create, put
from tests.bank.test_bank_encoder import B, close, forward


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that a bank of a few chunks has pieces of each kind, whole, cut short and moved back from the end."""
    monkeypatch.setattr(change, "_PIECE_BYTES", 1)
    monkeypatch.setattr(transfer, "_PIECE_BYTES", 1)
    monkeypatch.setattr(transfer, "_FEW", 5)
    monkeypatch.setattr(transfer, "_FEW_PIECES", 3)


def spread():
    """How to load over two devices."""
    return dict(mesh=MeshConfig(memory=2).make(jax.devices()[:2]))


def pointers(loaded):
    arrays = [array for array in loaded.bank.arrays.values() if array is not None]
    return [shard.data.unsafe_buffer_pointer() for array in arrays for shard in array.addressable_shards]


def of_chunks(bank, name, chunks):
    """Values and scales of some chunks, on whatever tier."""
    if bank.stored is not None and name != "routing_keys":
        kv = [bank.stored.source.reader.read(layer, np.arange(chunks.start, chunks.stop)) for layer in range(L)]
        return np.stack([pair[name == "content_v"] for pair in kv]), None
    values, scale = getattr(bank, name), getattr(bank, "key_scale" if name == "routing_keys" else f"{name}_scale")
    assert (values.dtype == np.int8) == (scale is not None)
    return np.asarray(values)[:, chunks], None if scale is None else np.asarray(scale)[..., chunks]


def says_the_same(loaded, store, namespaces=None):
    """The device holds each live text of each namespace once, where its layout says, and nothing else is anyone's."""
    want = {}
    for space, identity in store.search():
        if namespaces is None or space in namespaces:
            want.setdefault((space, store.get(identity, space).text), set()).add(identity)
    layout = loaded.bank.layout
    starts, lengths, owners = (np.asarray(x) for x in (layout.starts, layout.lengths, layout.chunk_documents))
    live = np.flatnonzero(lengths)
    np.testing.assert_array_equal(live, np.flatnonzero(loaded.rows >= 0))
    np.testing.assert_array_equal(live, np.flatnonzero(loaded.namespaces >= 0))
    nobody = owners == layout.num_documents
    assert (np.diff(owners[~nobody]) >= 0).all() and lengths.max(initial=0) <= layout.max_length
    for place, document in zip(live, store.documents(loaded.rows[live]), strict=True):
        assert document.id in want.pop((document.namespace, document.text))
        assert loaded.names[loaded.namespaces[place]] == document.namespace
        mine = slice(starts[place], starts[place] + lengths[place])
        assert (owners[mine] == place).all()
        nobody[mine] = True
        for name, values in chunks_of(document.text).items():
            got, scales = of_chunks(loaded.bank, name, mine)
            if scales is not None:
                values, want_scales = (quantize_keys if values.ndim == 3 else quantize_content)(values)
                np.testing.assert_array_equal(scales, want_scales)
            np.testing.assert_array_equal(got, values)
    assert not want and nobody.all()


def answers(loaded, store, names):
    """Hidden states, and for each layer and question the documents read, by their text and namespace."""
    output = forward(loaded.bank, loaded.visible([names] * B))
    read = [
        {(document.namespace, document.text) for document in store.documents(loaded.rows[places[lengths > 0]])}
        for layer, counts in zip(
            np.asarray(output.selection.documents), np.asarray(output.selection.lengths), strict=True
        )
        for places, lengths in zip(layer, counts, strict=True)
    ]
    return output.hidden, read


names = st.sampled_from(["a", "b", "c"])
texts = st.lists(
    st.sampled_from(["one", "two 1", "three", "four 9", "five", "six 3", "long 20"]), min_size=1, max_size=4
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), names, texts),
        st.tuples(st.just("update"), names, texts),
        st.tuples(st.just("delete"), names, st.integers(0, 3)),
        st.sampled_from([("refresh", "a", None), ("refresh", "a", None), ("compact", "a", None)]),
    ),
    max_size=12,
)


def take(store, step, count):
    what, name, value = step
    mine = [identity for space, identity in store.search() if space == name]
    if what == "add":
        put(store, {f"{count} {i}": text for i, text in enumerate(value)}, name)
    elif what == "update" and mine:
        put(store, dict(zip(mine, value, strict=False)), name, replace=True)
    elif what == "delete":
        store.delete(mine[value : value + 2], name)
    elif what == "compact":
        store.compact()


INT8 = dict(key_dtype="int8", content_dtype="int8")
FORMS = [{}, INT8, dict(content="host"), INT8 | dict(content="host"), dict(content="disk", key_dtype="int8")]


@settings(max_examples=15)
@given(
    steps=steps,
    shard=st.booleans(),
    only=st.sampled_from([None, ["a", "c"]]),
    form=st.sampled_from(FORMS),
    question=st.sampled_from("abc"),
)
def test_a_refreshed_bank_is_as_one_loaded_anew(tmp_path_factory, steps, shard, only, form, question):
    with create(tmp_path_factory.mktemp("bank")) as store:
        for name in "abc":
            put(store, {"first": "one", "second": name + " 30"}, name)
        loaded = load(store, namespaces=only, **form, **spread() if shard else {})
        for count, step in enumerate(steps):
            take(store, step, count)
            if step[0] == "refresh":
                loaded = loaded.refresh(store)
                says_the_same(loaded, store, only)
        # A reader at the newest version is as good as the writer.
        with MemoryStore(store.path) as reader:
            loaded = loaded.refresh(reader)
            assert loaded.version == reader.version
        says_the_same(loaded, store, only)
        if shard:  # the answers of a spread bank are for test_mesh.py
            return
        # A namespace of which nothing is left is gone after compaction.
        there = loaded.names
        anew = load(store, namespaces=only and [name for name in only if name in there], **form)
        asked = [name for name in question if name in there]
        got, want = answers(loaded, store, asked), answers(anew, store, asked)
    assert (loaded.version, loaded.names) == (anew.version, anew.names)
    close(got[0], want[0])
    assert got[1] == want[1] and all(name == question for read in got[1] for name, _ in read)


@pytest.mark.parametrize("form", ["spread", {}, *FORMS[3:]], ids=str)
def test_small_refreshes_compile_nothing_and_read_and_move_only_what_is_new(tmp_path, monkeypatch, form, compiled):
    read = []
    real = transfer.read_piece
    monkeypatch.setattr(transfer, "read_piece", lambda a, piece, s: read.append(piece.chunks) or real(a, piece, s))
    with create(tmp_path) as store:
        put(store, {f"d{i}": f"text {i}" for i in (2, 3, 40)})
        loaded = load(store, room=5.0, **spread() if form == "spread" else form)
        where, counted, mesh = pointers(loaded), [], spread()["mesh"]
        for i in range(12):
            read.clear()
            put(
                store, {f"new {i}": f"new {i % 4 + 1}"} if i % 3 else {"d2": f"changed {i} {7 + i}"}, replace=i % 3 == 0
            )
            if i % 3 == 2:
                store.delete([f"new {i - 1}"])
            compiled.clear()
            before, loaded = loaded.placement, loaded.refresh(store)
            written = len(compiled)
            new = loaded.placement.filled(before)
            assert all(any(first <= a and b <= last for first, last in new) for a, b in read)
            assert len(read) <= 12 and pointers(loaded) == where
            with jax.set_mesh(mesh) if form == "spread" else contextlib.nullcontext():
                visible = loaded.visible([None] * B)
                compiled.clear()
                forward(loaded.bank, visible)
            counted.append((written, len(compiled)))
        assert loaded.refresh(store) is loaded
        says_the_same(loaded, store)
    # A write has two shapes, of few chunks and of many, and both have come after the tenth.
    assert not any(written for written, _ in counted[10:]) and not any(read for _, read in counted[1:])


def test_a_bank_that_outgrows_its_room_is_loaded_anew_with_room_to_grow(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with create(tmp_path) as store:
        put(store, {"a": "a 100", "b": "b 28"})
        loaded = load(store)
        store.delete(["b"])
        put(store, {"c": "c 1"})
        loaded = loaded.refresh(store)
        # The same shape: what was deleted made room.
        assert loaded.bank.num_chunks == 128 and "version 4 is loaded anew, into room for 128 chunks" in caplog.text
        caplog.clear()
        put(store, {"d": "d 27"})
        loaded = loaded.refresh(store)
        assert not caplog.text and loaded.placement.chunks == loaded.bank.num_chunks == 128
        put(store, {"e": "e 1"}, "more")
        loaded = loaded.refresh(store)
        assert loaded.bank.num_chunks == 256 and "loaded anew" in caplog.text
        store.delete(["e"], "more")
        store.compact()
        # All would fit into 128 chunks, and none would be left for the next document.
        loaded = loaded.refresh(store)
        assert loaded.bank.num_chunks == 256
        store.delete(["a"])
        store.compact()
        loaded = loaded.refresh(store)
        assert loaded.bank.num_chunks == 128
        says_the_same(loaded, store)


def test_a_bank_that_shrinks_keeps_its_shape_while_half_of_it_is_used(tmp_path):
    with create(tmp_path) as store:
        put(store, {"a": "a 470", "b": "b 120", "c": "c 5"})
        loaded = load(store)
        for gone, chunks, room in (("b", 475, 640), ("a", 5, 128)):
            store.delete([gone])
            store.compact()
            loaded = loaded.refresh(store)
            assert (loaded.placement.chunks, loaded.bank.num_chunks) == (chunks, room)
        says_the_same(loaded, store)


def test_a_text_stays_while_one_document_has_it(tmp_path):
    with create(tmp_path) as store:
        put(store, {"a": "shared 3", "b": "shared 3", "c": "of c 2"})
        loaded = load(store)
        store.delete(["a"])
        loaded = loaded.refresh(store)
        assert loaded.placement.documents == 2
        says_the_same(loaded, store)
        store.delete(["b"])
        put(store, {"b": "shared 3"})
        loaded = loaded.refresh(store)
        assert loaded.placement.documents == 3
        says_the_same(loaded, store)


def test_another_version_is_followed_another_bank_is_loaded_and_another_models_is_refused(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with create(tmp_path / "one") as one, create(tmp_path / "two") as two:
        put(one, {"a": "a 3"})
        put(one, {"b": "b 4"}, "more")
        put(two, {"c": "c 3"})
        put(two, {"d": "d 5"}, "others")
        loaded = load(one)
        with MemoryStore(tmp_path / "one", version=2) as earlier:
            loaded = loaded.refresh(earlier)
            says_the_same(loaded, earlier)
            assert loaded.version == 2
        loaded = loaded.refresh(one)
        says_the_same(loaded, one)
        assert not caplog.text
        loaded = loaded.refresh(two)
        says_the_same(loaded, two)
        assert "two: version 3 is loaded anew" in caplog.text
        loaded.spec = dataclasses.replace(loaded.spec, fingerprint="of another")
        with pytest.raises(BankError, match="one: this bank was made by another model"):
            loaded.refresh(one)


def test_a_longer_document_raises_the_bound_that_is_compiled_for(tmp_path):
    with create(tmp_path) as store:
        put(store, {"a": "a 3"})
        loaded = load(store)
        assert loaded.bank.layout.max_length == 8
        put(store, {"b": "b 13"})
        loaded = loaded.refresh(store)
        assert loaded.bank.layout.max_length == 14
        says_the_same(loaded, store)


def test_a_refresh_that_cannot_read_leaves_the_bank_as_it_was(tmp_path, monkeypatch):
    with create(tmp_path) as store:
        put(store, {"a": "a 3"})
        loaded = load(store)
        put(store, {"b": "b 12"})
        real, calls = transfer.read_piece, []

        def fail(*args):
            calls.append(args)
            if len(calls) > 3:
                raise OSError("the disk is gone")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(transfer, "read_piece", fail)
            with pytest.raises(BankError, match=r"content_k cannot be read: the disk is gone"):
                loaded.refresh(store)
        with MemoryStore(tmp_path, version=2) as before:
            says_the_same(loaded, before)
        says_the_same(loaded.refresh(store), store)


def test_content_on_disk_outlives_the_store_it_was_loaded_from_until_it_is_given_back(tmp_path):
    with create(tmp_path) as store:
        put(store, {"a": "a 3", "b": "b 4"})
        with MemoryStore(tmp_path) as other:
            loaded = load(other, content="disk")
        put(store, {"c": "c 5"})
        store.delete(["a"])
        store.compact()
        for name, values in chunks_of("b 4").items():
            np.testing.assert_array_equal(of_chunks(loaded.bank, name, slice(3, 7))[0], values)
        loaded = loaded.refresh(store)
        says_the_same(loaded, store)
        store.compact()
        assert not (tmp_path / "bank-0").exists() and (tmp_path / "bank-1").exists()
        says_the_same(loaded, store)
        loaded.close()
        store.compact()
        assert not (tmp_path / "bank-1").exists()
