"""A bank over meshes of up to eight devices; tests/bank/test_mesh.py runs these tests in a process that has them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.collectives import collectives
from msa_jax.bank import transfer
from msa_jax.bank.encoder import encode_bank
from msa_jax.bank.loading import load
from msa_jax.bank.spread import spread
from msa_jax.bank.store import MemoryStore
from msa_jax.context import Route
from msa_jax.data.batch import pack_documents
from msa_jax.memory import DocumentLayout, MemoryBank
from msa_jax.sharding import MeshConfig, Shardings
from tests.bank.drawn import D, K, L, M, create, put
from tests.bank.test_bank_encoder import TOKENS, B, close, forward, model_of
from tests.bank.test_growth import says_the_same

# Uneven: one longer than a device's average, of which most have none of the others.
STEPS = [
    lambda store: put(store, {"a": "a 60", "b": "b 1", "c": "c 3"}),
    lambda store: put(store, {f"d{i}": f"d {i}" for i in (11, 13, 17)}),
    lambda store: put(store, {f"e{i}": f"e{i}, " for i in range(14)}, "more"),
    lambda store: store.delete(["a", "c"]),
    lambda store: put(store, {"b": "b anew 9", "d11": "d anew 2"}, replace=True),
    lambda store: put(store, {f"f{i}": f"f{i} 20" for i in range(30)}, "many"),
]


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """A store, and for each of its versions the answers of one device."""
    path = tmp_path_factory.mktemp("versions")
    answers = {}
    with create(path) as store:
        put(store, {})
        for step in STEPS:
            step(store)
            answers[store.version] = answers_of(load(store, room=20.0), store)
    return path, answers


def answers_of(loaded, store, mesh=None):
    """Of two questions, the second of which names no namespace: hidden states, and the rows that were read."""
    spaces = [name for name in ("default", "more") if name in loaded.names]
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        output = jax.device_get(forward(loaded.bank, loaded.visible([spaces, None])))
    rows = np.where(output.selection.lengths > 0, loaded.rows[output.selection.documents], -1)
    return output.hidden, rows, output.selection.scores


SHAPES = [(1, 1, 1), (2, 1, 2), (1, 8, 1), (2, 4, 1), (1, 2, 4), (1, 1, 8)]
INT8 = dict(key_dtype="int8", content_dtype="int8")


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_a_spread_bank_answers_as_one_device_and_follows_its_store(versions, sizes):
    path, answers = versions
    data, memory, model = sizes
    mesh = MeshConfig(data=data, memory=memory, model=model).make(jax.devices()[: data * memory * model])
    loaded, empty = None, []
    for version, want in answers.items():
        with MemoryStore(path, version=version) as store:
            if loaded is None:
                loaded = load(store, mesh=mesh, room=20.0)
            else:
                loaded = loaded.refresh(store)
            says_the_same(loaded, store)
            got = answers_of(loaded, store, mesh)
            close(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])
            close(got[2], want[2])
        empty.append(np.count_nonzero(loaded.placement.chunks == 0))
        lies_in_parts(loaded, mesh)
    assert empty[0] == max(0, memory * model - 2)


def lies_in_parts(loaded, mesh):
    """Each device has an equal part, of whole documents, and knows how much of it is taken."""
    layout = loaded.bank.layout
    axes = Shardings.inference().bank
    parts = mesh.shape["memory"] * mesh.shape["model"]
    chunks, documents = layout.num_chunks // parts, layout.num_documents // parts
    assert layout.axes == axes and (layout.num_chunks, layout.num_documents) == (chunks * parts, documents * parts)
    live = np.flatnonzero(np.asarray(layout.lengths))
    first, length = np.asarray(layout.starts)[live], np.asarray(layout.lengths)[live]
    np.testing.assert_array_equal(first // chunks, live // documents)
    np.testing.assert_array_equal((first + length - 1) // chunks, live // documents)
    taken = loaded.placement.source.reshape(parts, chunks) >= 0
    np.testing.assert_array_equal(taken, np.arange(chunks) < loaded.placement.chunks[:, None])
    bank = loaded.bank
    arrays = [(bank.routing_keys, 1), (bank.content_v, 1), (bank.key_scale, 1), (bank.content_k_scale, 2)]
    arrays.append((layout.starts, 0))
    for array, axis in (pair for pair in arrays if pair[0] is not None):
        for shard in array.addressable_shards:
            ((_, *place),) = np.argwhere(mesh.devices == shard.device)
            part = np.ravel_multi_index(place, mesh.devices.shape[1:])
            size = array.shape[axis] // parts
            assert shard.index[axis].indices(array.shape[axis])[:2] == (part * size, (part + 1) * size)


@pytest.mark.parametrize(
    "form, like", [(INT8 | dict(content="host"), INT8), (dict(content="disk"), None)], ids=["int8 host", "disk"]
)
def test_int8_and_content_off_the_device_are_spread_too(versions, form, like):
    path, answers = versions
    mesh = MeshConfig(memory=2, model=2).make()
    with MemoryStore(path, version=3) as store:
        loaded = load(store, mesh=mesh, **form)
    with MemoryStore(path, version=5) as store:
        loaded = loaded.refresh(store)
        says_the_same(loaded, store)
    # There is no room for what came last: all is placed and loaded anew.
    last, room = max(answers), loaded.bank.num_chunks
    with MemoryStore(path, version=last) as store:
        loaded = loaded.refresh(store)
        assert loaded.bank.num_chunks > room
        says_the_same(loaded, store)
        lies_in_parts(loaded, mesh)
        got = answers_of(loaded, store, mesh)
        want = answers_of(load(store, **like), store) if like else answers[last]
    close(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    loaded.close()


def test_what_is_new_is_read_once_and_for_one_device_whatever_holds_the_same(versions, monkeypatch):
    path, (first, second, *_) = versions
    read, real = [], transfer.read_piece
    monkeypatch.setattr(transfer, "read_piece", lambda a, piece, s: read.append(piece) or real(a, piece, s))
    with MemoryStore(path, version=first) as store:
        loaded = load(store, mesh=MeshConfig(data=2, memory=4).make())
    reads_once(read, loaded.placement.filled())
    # The longest lies alone; two devices have nothing, and get what is new before the others do.
    np.testing.assert_array_equal(loaded.placement.chunks, [60, 4, 0, 0])
    read.clear()
    with MemoryStore(path, version=second) as store:
        before, loaded = loaded.placement, loaded.refresh(store)
    reads_once(read, loaded.placement.filled(before))
    np.testing.assert_array_equal(loaded.placement.chunks, [60, 21, 11, 13])


def test_a_bank_without_documents_is_spread_and_grows(tmp_path):
    mesh = MeshConfig(memory=8).make()
    with create(tmp_path) as store:
        loaded = load(store, mesh=mesh)
        lies_in_parts(loaded, mesh)
        put(store, {"a": "a 3"})
        loaded = loaded.refresh(store)
        says_the_same(loaded, store)
        lies_in_parts(loaded, mesh)


def reads_once(pieces, spans):
    """Each layer of each field of these chunks, in pieces that do not overlap."""
    want = {(layer, chunk) for first, last in spans for chunk in range(first, last) for layer in range(L)}
    for field in ("routing_keys", "content_k", "content_v"):
        mine = [piece for piece in pieces if piece.part.field == field]
        got = [(i, chunk) for p in mine for chunk in range(*p.chunks) for i in range(*p.layers)]
        assert len(got) == len(want) and set(got) == want


def compiled_question(mesh, chunks, documents):
    """The HLO of questions to an int8 bank of these sizes, in which questions, bank and model are spread."""
    shardings = Shardings.inference()
    axes = shardings.bank

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))

    ranges = array((documents,), jnp.int32, axes)
    content = array((L, chunks, K, D), jnp.int8, None, axes)
    scales = array((L, K, chunks), jnp.float32, None, None, axes)
    bank = MemoryBank(
        array((L, chunks, M), jnp.int8, None, axes), content, content,
        DocumentLayout(array((chunks,), jnp.int32, axes), ranges, ranges, max_length=8, axes=axes),
        key_scale=array((L, chunks), jnp.float32, None, axes), content_k_scale=scales, content_v_scale=scales,
    )  # fmt: skip
    graphdef, params = nnx.split(model_of(vocab_size=40))
    places = shardings.parameters(params, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, places)

    @functools.partial(jax.jit, static_argnames="graphdef")
    def ask(graphdef, params, bank, visible):
        return nnx.merge(graphdef, params).prefill(TOKENS, read=Route(bank, visible=visible))

    with jax.set_mesh(mesh):
        visible = array((B, documents), bool, "data", axes)
        return ask.lower(graphdef, params, bank, visible).compile().as_text()


def test_what_crosses_devices_does_not_grow_with_the_bank():
    mesh = MeshConfig(memory=2, model=2).make()
    small, large = (
        sorted((c.op, c.nbytes, c.times) for c in collectives(compiled_question(mesh, 4 * chunks, 4 * documents)))
        for chunks, documents in ((128, 16), (1024, 512))
    )
    assert small == large and {op for op, *_ in small} == {"all-gather", "all-reduce"}
    # The largest is of hidden units of the MLP or less: [B, T, F] float32.
    assert max(nbytes for _, nbytes, _ in small) <= 4 * TOKENS.size * 20


@pytest.mark.parametrize(("sizes", "documents"), [((1, 8, 1), 11), ((1, 8, 1), 3), ((2, 2, 2), 5)])
def test_a_bank_made_in_memory_is_spread(sizes, documents):
    rng = np.random.default_rng(documents)
    lists = [rng.integers(1, 37, size=rng.integers(1, 24)) for _ in range(documents)]
    bank = encode_bank(model_of(), pack_documents(lists, chunk_size=4, row_len=24), rows_per_step=8)
    visible = rng.random((B, documents)) < 0.8
    want = forward(bank, visible)
    mesh = MeshConfig(data=sizes[0], memory=sizes[1], model=sizes[2]).make(
        jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    )
    over = spread(bank, mesh, Shardings.inference())
    room = over.num_documents - documents
    with jax.set_mesh(mesh):
        got = jax.device_get(forward(over, np.pad(visible, ((0, 0), (0, room)))))
    close(got.hidden, want.hidden)
    close(got.document_scores[..., :documents], want.document_scores)
    read = np.asarray(want.selection.lengths) > 0
    np.testing.assert_array_equal(got.selection.lengths[..., : read.shape[-1]] > 0, read)
    np.testing.assert_array_equal(
        got.selection.documents[..., : read.shape[-1]][read], np.asarray(want.selection.documents)[read]
    )
    with pytest.raises(ValueError, match="spread: needs a bank of floats on one device"):
        spread(over, mesh, Shardings.inference())
