"""A bank from disk onto devices: filtered, sharded, in bounded memory, and nothing of other namespaces with it."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax.bank import change, transfer
from msa_jax.bank.change import Encoded
from msa_jax.bank.loading import load
from msa_jax.bank.manifest import BankSpec
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import BankDocument
from msa_jax.errors import BankError
from msa_jax.memory.places import capacity_for
from msa_jax.sharding import MeshConfig, Shardings
from tests.bank import drawn
from tests.bank.test_bank_encoder import close, forward
from tests.bank.test_ingest_and_load import TEXTS, create, documents, encoder_of, same_bank


def test_namespaces_load_alone_and_questions_see_what_they_name(tmp_path):
    with create(tmp_path) as store:
        for i, text in enumerate(TEXTS):
            store.add([BankDocument(str(i), text, namespace="odd" if i % 2 else "even")], encoder_of())
        same_bank(load(store, namespaces=["odd"]), TEXTS[1::2], numbers=[2, 4])
        picked = load(store, rows=np.array([3, 0]))
        same_bank(picked, [TEXTS[0], TEXTS[3]], numbers=[1, 4])
        store.add([BankDocument("more", "one more")], encoder_of())
        same_bank(picked.refresh(store), [TEXTS[0], TEXTS[3]], numbers=[1, 4])
        store.delete(["more"], "default")
        loaded = load(store)
        visible = loaded.visible([["odd"], None, ["even", "odd"], []])[:, :5]
        np.testing.assert_array_equal(visible, [[0, 1, 0, 1, 0], [1] * 5, [1] * 5, [0] * 5])
        assert not loaded.visible([None])[:, 5:].any()
        for call in (lambda: load(store, namespaces=["none"]), lambda: loaded.visible([["none"]])):
            with pytest.raises(BankError, match="no namespace 'none'.*even, odd"):
                call()


texts = st.lists(st.text("abcdef ", min_size=1, max_size=20), min_size=1, max_size=3, unique=True)


@settings(max_examples=6)
@given(mine=texts, theirs=texts, changed=texts)
def test_no_document_of_another_namespace_can_influence_an_output(tmp_path_factory, mine, theirs, changed):
    outputs = []
    for others in (theirs, changed, []):
        with create(tmp_path_factory.mktemp("bank")) as store:
            # First mine, whose numbers tell how many texts came before.
            store.add([*documents(mine, "mine"), *documents(others, "theirs")], encoder_of())
            loaded = load(store)
            output = forward(loaded.bank, loaded.visible([["mine"]] * 2))
        read = np.asarray(output.selection.documents)[np.asarray(output.selection.lengths) > 0]
        assert set(loaded.namespaces[read]) == {loaded.names.index("mine")}
        outputs.append(output.hidden)
    close(outputs[1], outputs[0])
    close(outputs[2], outputs[0])


@given(st.integers(0, 10**9))
def test_capacities_waste_little_and_are_few(size):
    capacity = capacity_for(size, multiple=1)
    assert size <= capacity <= max(8, 1.25 * size + 1)
    assert capacity_for(size) % 128 == 0 and capacity_for(size) >= size
    assert capacity_for(capacity, multiple=1) == capacity


# Prints bytes of a loaded bank, and by how much they are exceeded by the peak of memory while it is loaded.
_PEAK = """
import sys
import jax
from msa_jax.bank import MemoryStore, load

def memory(what):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

jax.numpy.zeros(1).block_until_ready()
dtype = sys.argv[2] or None
with MemoryStore(sys.argv[1]) as store:
    before = memory("VmRSS")
    bank = jax.block_until_ready(load(store, key_dtype=dtype, content_dtype=dtype).bank)
    print(bank.nbytes, memory("VmHWM") - before - bank.nbytes)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_the_host_holds_one_copy_of_a_bank_while_it_is_loaded_and_none_in_float_of_int8(tmp_path, root):
    layers, chunks, heads, dim = 3, 98_304, 2, 64
    spec = BankSpec("", "", 4, layers, heads * dim, heads, dim, "bfloat16")
    block = np.random.default_rng(0).integers(1, 255, (layers, chunks, heads * dim), np.uint8).astype(spec.dtype)
    content = block.reshape(layers, chunks, heads, dim)
    lengths = np.full(chunks // 8, 8, np.int64)
    ordinals = np.arange(1, 1 + len(lengths))
    encoded = Encoded(block, content, content, lengths, lengths * 4, ordinals, ordinals)
    with MemoryStore.create(tmp_path, spec) as store:
        texts = [BankDocument(str(i), str(i)) for i in range(len(lengths))]
        store.append(texts, encoded, range(len(lengths)))
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(root)}
    for dtype in ("", "int8"):
        command = [sys.executable, "-c", _PEAK, tmp_path, dtype]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        size, more = map(int, run.stdout.split())
        assert size >= 3 * block.nbytes // (2 if dtype else 1) and 0 < more < 1.5 * block.nbytes, run.stdout


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(content_dtype="int4"), "content_k .* as 'int8', not as 'int4'"),
        (dict(content="tape"), "'device', 'host' or 'disk', not to 'tape'"),
        (dict(content="disk", content_dtype="int8"), "read as it is stored: leave content_dtype out"),
        (dict(content="host", mesh=2, shardings=Shardings()), "serves one device, and this bank is on 2"),
        (dict(mesh=2, shardings=Shardings(bank=("memory", "chunks"))), "axes data, memory, model and no 'chunks'"),
    ],
)
def test_what_cannot_be_loaded_is_refused(tmp_path, wrong, message):
    if "mesh" in wrong:
        wrong = wrong | dict(mesh=MeshConfig(memory=2).make(jax.devices()[:2]))
    with create(tmp_path) as store, pytest.raises(ValueError, match=message):
        load(store, **wrong)


def test_fragments_of_a_bank_are_read_as_they_are(tmp_path, monkeypatch):
    """Every other document deleted, and long ones between: pieces of one run, of two, and of single chunks."""
    monkeypatch.setattr(change, "_PIECE_BYTES", 1)
    monkeypatch.setattr(transfer, "_PIECE_BYTES", 256 * drawn.M * 4)
    with drawn.create(tmp_path) as store:
        lengths = [*[1, 2, 3] * 30, 1, 600, 1, 601, *[2, 1] * 40]
        drawn.put(store, {str(i): f"document {i}-{n} {n}" for i, n in enumerate(lengths)})
        store.delete([str(i) for i in range(0, len(lengths), 2)])
        bank = load(store).bank
        first = 0
        for document in store.documents(store.table.alive):
            for name, values in drawn.chunks_of(document.text).items():
                np.testing.assert_array_equal(getattr(bank, name)[:, first : first + values.shape[1]], values)
            first += values.shape[1]
        assert first > 1300
