"""A bank over a mesh: who holds what, answers as of one device, and how little crosses devices when it is asked."""

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax.bank import transfer
from msa_jax.bank.capacity import shares_of
from msa_jax.bank.loading import load
from msa_jax.bank.store import MemoryStore
from msa_jax.memory import DocumentLayout, MemoryBank
from msa_jax.sharding import MeshConfig, Shardings
from tests.bank.drawn import D, K, L, M, create, put
from tests.bank.test_growth import says_the_same
from tests.test_bank_encoder import POSITIONS, TOKENS, B, close, forward, model_of

EIGHT = jax.device_count() >= 8
on_eight = pytest.mark.skipif(not EIGHT, reason="test_on_eight_devices runs it, in a process of its own")


@pytest.mark.skipif(EIGHT, reason="all tests here have eight devices")
def test_on_eight_devices(root):
    # Most of the time is compilation, for many meshes.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not of_their_own", __file__]
    run = subprocess.run(command, cwd=root, env=os.environ | devices, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@st.composite
def parts_in_use(draw):
    lengths = np.array(draw(st.lists(st.integers(1, 30), max_size=40)), np.int64)
    parts = draw(st.integers(1, 9))
    taken = st.lists(st.integers(0, 60), min_size=parts, max_size=parts)
    room = draw(st.integers(60, 200)), draw(st.integers(60, 80))
    return lengths, np.array(draw(taken)), np.array(draw(taken)), *room


@settings(max_examples=200)
@given(parts_in_use())
def test_documents_go_where_there_is_most_room(case):
    lengths, chunks, documents, part_chunks, part_documents = case
    shares = shares_of(*case)
    if shares is None:
        # Runs that are cut between documents leave less than the longest one unused in each part.
        spare = len(chunks) * (int(lengths.max()) - 1)
        assert lengths.sum() > (part_chunks - chunks).sum() - spare or (
            len(lengths) > (part_documents - documents).min()
        )
        return
    assert sorted(i for share in shares for i in range(len(lengths))[share]) == list(range(len(lengths)))
    after = chunks + [lengths[share].sum() for share in shares]
    counts = documents + [len(lengths[share]) for share in shares]
    assert (after <= part_chunks).all() and (counts <= part_documents).all()
    grown = after > chunks
    if grown.any() and (counts < part_documents).all():
        # No part is filled higher than to the common level and a document beyond it.
        level = next(x for x in range(10_000) if np.maximum(x - chunks, 0).sum() >= lengths.sum())
        assert after[grown].max() < level + lengths.max()


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


@on_eight
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
    taken = loaded.source.reshape(parts, chunks) >= 0
    np.testing.assert_array_equal(taken, np.arange(chunks) < loaded.placement.chunks[:, None])
    arrays = [(loaded.bank.routing_keys, 1), (loaded.bank.content_v, 1), (layout.starts, 0)]
    for array, axis in (pair for pair in arrays if pair[0] is not None):
        for shard in array.addressable_shards:
            ((_, *place),) = np.argwhere(mesh.devices == shard.device)
            part = np.ravel_multi_index(place, mesh.devices.shape[1:])
            size = array.shape[axis] // parts
            assert shard.index[axis].indices(array.shape[axis])[:2] == (part * size, (part + 1) * size)


@on_eight
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


@on_eight
def test_what_is_new_is_read_once_and_for_one_device_whatever_holds_the_same(versions, monkeypatch):
    path, (first, second, *_) = versions
    read, real = [], transfer._read
    monkeypatch.setattr(transfer, "_read", lambda a, piece, s: read.append(piece) or real(a, piece, s))
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


@on_eight
def test_a_bank_without_documents_is_spread_and_grows(tmp_path):
    mesh = MeshConfig(memory=8).make()
    with create(tmp_path) as store:
        loaded = load(store, mesh=mesh)
        lies_in_parts(loaded, mesh)
        put(store, {"a": "a 3"})
        loaded = loaded.refresh(store)
        says_the_same(loaded, store)
        lies_in_parts(loaded, mesh)


def test_processes_read_what_lies_on_devices_of_their_own(tmp_path, root):
    with create(tmp_path) as store:
        put(store, {f"d{i}": f"text {i}" for i in (7, 2, 3, 9, 11)})
        store.delete(["d2"])
        put(store, {f"e{i}": f"more {i}" for i in (5, 4, 8)})
        alone = load(store)
        output = forward(alone.bank, alone.visible([None] * B))
        want = np.asarray(output.hidden), alone.rows[np.asarray(output.selection.documents)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "tests.bank.mesh_process", tmp_path, str(port)]
    start = functools.partial(subprocess.Popen, cwd=root, env=os.environ | devices, text=True)
    runs = [start([*command, str(i), "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
    parts = []
    for run in runs:
        out, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
        said = json.loads(out.splitlines()[-1])
        close(np.array(said["hidden"]), want[0])
        np.testing.assert_array_equal(said["rows"], want[1])
        held = [tuple(part) for part in said["held"]]
        assert {tuple(part) for part, _ in said["read"]} == set(held)
        assert all(first >= part[0] and last <= part[1] for part, (first, last) in said["read"])
        parts += held
    assert len(set(parts)) == 4


def reads_once(pieces, spans):
    """Each layer of each field of these chunks, in pieces that do not overlap."""
    want = {(layer, chunk) for first, last in spans for chunk in range(first, last) for layer in range(L)}
    for field in ("routing_keys", "content_k", "content_v"):
        mine = [piece for piece in pieces if piece.part.field == field]
        got = [(i, chunk) for p in mine for chunk in range(*p.chunks) for i in range(*p.layers)]
        assert len(got) == len(want) and set(got) == want


_COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


def collectives(hlo):
    """Of each collective in a compiled program: what it is, and the bytes of its results."""
    found = []
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ((?:ragged-)?(?:{_COLLECTIVES}))(?:-start)?\(", line)
        if match:
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [_BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in arrays]
            found.append((match[2], sum(sizes)))
    return sorted(found)


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
        return nnx.merge(graphdef, params)(TOKENS, positions=POSITIONS, bank=bank, visible=visible)

    with jax.set_mesh(mesh):
        visible = array((B, documents), bool, "data", axes)
        return ask.lower(graphdef, params, bank, visible).compile().as_text()


@on_eight
def test_what_crosses_devices_does_not_grow_with_the_bank():
    mesh = MeshConfig(memory=2, model=2).make()
    small, large = (collectives(compiled_question(mesh, 8 * c, 8 * n)) for c, n in ((128, 16), (1024, 512)))
    assert small == large and {what for what, _ in small} == {"all-gather", "all-reduce"}
    # The largest is of hidden states, [B, T, E] float32 or a part of it.
    assert max(size for _, size in small) <= 4 * TOKENS.size * 20 and len(small) < 30
