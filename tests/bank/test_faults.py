"""Whatever strikes a bank, the last committed version is there, or one sentence says what is damaged."""

import dataclasses
import os
import pathlib
import random
import resource
import subprocess
import tempfile
import time

import pytest

from msa_jax.bank import manifest as manifests
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import BankDocument
from msa_jax.errors import BankError
from tests.bank import faults
from tests.bank.test_store import SPEC, check, put


def kill_and_look(path, times, seed):
    """Kill a writer at random moments, and look at what it left each time."""
    rng = random.Random(seed)
    seen = set()
    for _ in range(times):
        here, there = faults.context.Pipe()
        process = faults.context.Process(target=faults.keep_writing, args=(path, there))
        process.start()
        for _ in range(rng.randrange(1, 9)):
            assert here.poll(60), "the writer stopped by itself"
            last = here.recv()
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.join()
        while here.poll():
            last = here.recv()
        with MemoryStore(path) as store:
            assert store.version in (last, last + 1)  # the one that was under way may have come through
            check(store, {("default", name): d for name, d in faults.expected(store.version).items()})
            store.verify()
            seen.add(store.version % 7)
    return seen


def test_kill_9_at_any_moment_leaves_the_last_version(tmp_path):
    MemoryStore.create(tmp_path / "bank", SPEC).close()
    kill_and_look(tmp_path / "bank", 12, seed=0)


@pytest.mark.slow
def test_kill_9_at_200_moments(tmp_path):
    MemoryStore.create(tmp_path / "bank", SPEC).close()
    # Every kind of change was struck.
    assert kill_and_look(tmp_path / "bank", 200, seed=1) == set(range(7))


def test_what_a_killed_writer_was_writing_does_not_reach_the_next_ones_files(tmp_path):
    # Once in some hundred kills: the file that was to be renamed is there, longer than the next one.
    MemoryStore.create(tmp_path, SPEC).close()
    for name in ("CURRENT", "bank-0/manifest.ocdbt"):
        (tmp_path / f"{name}.__lock").write_bytes(b"half written " * 999)
    with MemoryStore(tmp_path, writable=True) as store:
        put(store, [BankDocument("a", "b")])
        store.compact()
    check(MemoryStore(tmp_path), {("default", "a"): BankDocument("a", "b")})


def test_every_flipped_byte_is_found_or_of_no_consequence(tmp_path):
    rng = random.Random(0)
    wanted = {("default", str(i)): BankDocument(str(i), f"a text of {i} " * (i % 7)) for i in range(1, 40)}
    with MemoryStore.create(tmp_path, SPEC) as store:
        put(store, list(wanted.values()))
        store.compact()
        check(store, wanted)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size]
    found = 0
    for _ in range(150):
        path = rng.choices(files, [p.stat().st_size for p in files])[0]
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        try:
            with MemoryStore(tmp_path) as store:
                store.verify()
                check(store, wanted)  # a byte that nothing reads, such as one of an earlier version
        except BankError as e:
            assert "\n" not in str(e)
            found += 1
        path.write_bytes(whole)
    assert found > 100
    with MemoryStore(tmp_path) as store:
        check(store, wanted)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path, keep):
    with MemoryStore.create(tmp_path, SPEC) as store:
        put(store, [BankDocument(str(i), f"text {i}" * 9) for i in range(40)])
    for path in (tmp_path / "bank-0" / "d").iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(BankError, match="damaged|cut short|no manifest"):
        with MemoryStore(tmp_path) as store:
            store.verify()


def bulky(name):
    """A document that takes 8 KB."""
    return BankDocument(name, f"text {name}", metadata={"noise": os.urandom(8000).hex()})


def add_much(path):
    with MemoryStore(path, writable=True) as store:
        put(store, [bulky(f"new {i}") for i in range(100)])


def compact_with_limit(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    with MemoryStore(path, writable=True) as store:
        store.compact()


def add_with_limit(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    add_much(path)


def test_files_that_cannot_grow_leave_the_last_version(tmp_path):
    wanted = {("default", str(i)): BankDocument(str(i), f"text {i}") for i in range(30)}
    with MemoryStore.create(tmp_path, SPEC) as store:
        put(store, list(wanted.values()))
    assert "nothing was written, the last version stands: " in faults.in_a_process(add_with_limit, tmp_path)
    assert "File too large" in faults.in_a_process(compact_with_limit, tmp_path)
    with MemoryStore(tmp_path, writable=True) as store:
        assert (store.version, store.name) == (2, "bank-0") and not (tmp_path / "bank-1").exists()
        check(store, wanted)
        store.compact()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_leaves_the_last_version(small_disk):
    wanted = {("default", str(i)): bulky(str(i)) for i in range(50)}
    with MemoryStore.create(small_disk, SPEC) as store:
        put(store, list(wanted.values()))
        with pytest.raises(BankError, match="nothing was written, the last version stands: .*No space left"):
            put(store, [bulky(f"new {i}") for i in range(900)])
        check(store, wanted)
        rest = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(bytes(max(0, rest.f_bavail * rest.f_frsize - 900_000)))
        with pytest.raises(BankError, match="No space left"):
            store.compact()
        (small_disk / "filler").unlink()
        assert not (small_disk / "bank-1").exists()
        check(store, wanted)
        put(store, [BankDocument("after", "there is room again")])
    check(MemoryStore(small_disk), wanted | {("default", "after"): BankDocument("after", "there is room again")})


def write_as_nobody(path):
    faults.become_nobody()
    with MemoryStore(path) as store:
        assert store.get("a").text == "b"
    MemoryStore(path, writable=True)


def create_as_nobody(path):
    faults.become_nobody()
    MemoryStore.create(path / "new", SPEC)


def read_as_nobody(path):
    faults.become_nobody()
    MemoryStore(path)


def test_missing_permissions_are_named():
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "bank"
        os.chmod(folder, 0o755)
        with MemoryStore.create(path, SPEC) as store:
            put(store, [BankDocument("a", "b")])
        for part in [path, *path.rglob("*")]:
            os.chmod(part, 0o555 if part.is_dir() else 0o444)
        try:
            assert "cannot be written: Permission denied" in faults.in_a_process(write_as_nobody, path)
            assert "cannot be made here" in faults.in_a_process(create_as_nobody, path)
            os.chmod(path / "bank-0", 0)
            assert "Permission denied" in faults.in_a_process(read_as_nobody, path)
        finally:
            os.chmod(path, 0o755)
            for part in path.rglob("*"):
                os.chmod(part, 0o755)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "FORMAT", 7)
    MemoryStore.create(tmp_path, SPEC).close()
    monkeypatch.undo()
    monkeypatch.setattr(manifests, "FORMAT", 1)
    MemoryStore.create(tmp_path / "old", SPEC).close()
    monkeypatch.undo()
    with pytest.raises(BankError, match="format 1, and this version reads 2: encode the documents anew"):
        MemoryStore(tmp_path / "old")
    with pytest.raises(BankError, match="a bank of format 7, and this version reads 2: update the package"):
        MemoryStore(tmp_path)


def test_another_models_documents_cannot_be_merged(tmp_path):
    from msa_jax.bank.parts import merge

    with MemoryStore.create(tmp_path / "a", SPEC) as store:
        with MemoryStore.create(tmp_path / "b", dataclasses.replace(SPEC, fingerprint="of another")) as other:
            with pytest.raises(BankError, match="made by another model"):
                merge(store, other)
