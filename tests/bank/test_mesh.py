"""A bank over a mesh: who holds what, answers as of one device, and how little crosses devices when it is asked."""

import functools
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax.bank.loading import load
from msa_jax.memory.places import shares_of
from tests.bank.drawn import create, put
from tests.bank.test_bank_encoder import B, close, forward


@pytest.mark.slow
def test_on_eight_devices(root):
    # Most of the time is compilation, for many meshes.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_llvm_disable_expensive_passes=true"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/bank/on_eight_devices.py"]
    run = subprocess.run(command, cwd=root, env=os.environ | devices, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout


@st.composite
def parts_in_use(draw):
    lengths = np.array(draw(st.lists(st.integers(1, 30), max_size=40)), np.int64)
    parts = draw(st.integers(1, 9))
    taken = st.lists(st.integers(0, 60), min_size=parts, max_size=parts)
    chunks, documents = np.array(draw(taken)), np.array(draw(taken))
    room = draw(st.integers(0, 140)), draw(st.integers(0, 20))
    return lengths, chunks, documents, chunks.max() + room[0], documents.max() + room[1]


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
