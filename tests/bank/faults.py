"""A writer whose every version is foretold, and processes that are stopped while it writes, for `test_faults`."""

import multiprocessing
import os
import traceback

from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import BankDocument
from msa_jax.errors import BankError
from tests.bank.test_store import put

# Children start from a server that has imported everything.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.bank.faults"])


def change(version, live):
    """What leads from a version with the ids `live`, sorted, to the next one: an operation and what it is of."""
    step = version % 7
    if step == 0:
        return "compact", []
    if step == 3:
        return "update", [BankDocument(live[version % len(live)], f"changed in {version}", title="new")]
    if step == 5:
        return "delete", live[:-5]
    return "add", [BankDocument(f"{version:05d} {i}", f"text {version} {i}" * 9) for i in range(3)]


def expected(version):
    """The documents of a version, by id."""
    documents = {}
    for before in range(1, version):
        operation, values = change(before, sorted(documents))
        if operation == "delete":
            documents = {name: d for name, d in documents.items() if name not in values}
        else:
            documents |= {d.id: d for d in values}
    return documents


def write_on(store):
    """Make the next change."""
    operation, values = change(store.version, sorted(identity for _, identity in store.search()))
    if operation == "compact":
        store.compact()
    elif operation == "delete":
        store.delete(values)
    else:
        put(store, values, {"add": "append", "update": "replace"}[operation])


def keep_writing(path, pipe):
    """Change a bank until killed, sending each version when it is committed."""
    with MemoryStore(path, writable=True) as store:
        while True:
            pipe.send(store.version)
            write_on(store)


def refused(act, path, pipe):
    """Do something that should be refused, and send its sentence."""
    try:
        act(path)
        pipe.send("it was not refused")
    except BankError as e:
        pipe.send(str(e))
    except BaseException:
        pipe.send(traceback.format_exc())


def in_a_process(act, path):
    """What `refused` sends, from a process of its own."""
    here, there = context.Pipe()
    process = context.Process(target=refused, args=(act, path, there))
    process.start()
    sentence = here.recv()
    process.join()
    return sentence


def become_nobody():
    """Give up the rights of root, which no permission stops."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
