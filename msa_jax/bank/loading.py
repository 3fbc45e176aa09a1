"""From a bank on disk to the device: the chunks of live documents, straight into (sharded) arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from msa_jax.bank.manifest import BankError
from msa_jax.bank.store import ARRAYS, MemoryStore
from msa_jax.bank.table import LENGTH, NAMESPACE, START
from msa_jax.memory import DocumentLayout, MemoryBank

# Capacities are a power of two times one of these, so that a growing bank is compiled for seldom and wastes at
# most a fifth.
_STEPS = (8, 10, 12, 14)


def capacity_for(size: int, *, multiple: int = 128) -> int:
    """The smallest capacity of at least `size` that banks are padded to, a multiple of `multiple`."""
    power = 0
    while True:
        for step in _STEPS:
            capacity = -(-(step << power) // multiple) * multiple
            if capacity >= size:
                return capacity
        power += 1


@dataclasses.dataclass(frozen=True)
class LoadedBank:
    """A bank on the device, and which documents of the store its documents are.

    Attributes:
      bank: C and N padded to capacities; padding is of no document.
      rows: row in the store's table of each document there is; documents of equal text in one namespace are one.
      namespaces: number of the namespace of each of the N documents, -1 for padding.
      names: names of the namespaces.
    """

    bank: MemoryBank
    rows: np.ndarray
    namespaces: np.ndarray
    names: tuple[str, ...]

    def visible(self, questions: Sequence[Sequence[str] | None]) -> np.ndarray:
        """[B, N] bool: documents that each question may see, by the namespaces it names; None names all.

        Raises:
          BankError: a name that no document has.
        """
        masks = []
        for names in questions:
            unknown = set(names or ()) - set(self.names)
            if unknown:
                raise BankError(f"no namespace {sorted(unknown)[0]!r} in this bank: it has {', '.join(self.names)}.")
            numbers = range(len(self.names)) if names is None else [self.names.index(name) for name in names]
            masks.append(np.isin(self.namespaces, list(numbers)))
        return np.stack(masks)


def load(
    store: MemoryStore,
    *,
    namespaces: Sequence[str] | None = None,
    sharding: jax.sharding.Sharding | None = None,
    layout_sharding: jax.sharding.Sharding | None = None,
) -> LoadedBank:
    """Load live documents onto the device.

    Every device's part is read from disk for itself; there is no copy of the whole bank on the host.

    Args:
      store: an open bank.
      namespaces: which ones; default all.
      sharding: of arrays [L_r, C, ...]; default the first device.
      layout_sharding: of the layout's arrays [C] and [N]; default the first device.

    Raises:
      BankError: no such namespace.
    """
    table, spec = store.table, store.spec
    rows = table.alive
    if namespaces is not None:
        unknown = [name for name in namespaces if name not in table.namespaces]
        if unknown:
            raise BankError(f"{store.path}: no namespace {unknown[0]!r}: it has {', '.join(table.namespaces)}.")
        numbers = [table.namespaces.index(name) for name in namespaces]
        rows = rows[np.isin(table.columns[rows, NAMESPACE], numbers)]
    # Documents of one text share their chunks: one of them stands for all.
    _, first = np.unique(table.columns[rows, START], return_index=True)
    rows = rows[np.sort(first)]
    rows = rows[np.argsort(table.columns[rows, START], kind="stable")]
    lengths = table.columns[rows, LENGTH]
    ends = np.cumsum(lengths)
    chunks = int(ends[-1]) if len(rows) else 0
    capacity, documents = capacity_for(chunks), capacity_for(len(rows))
    source = np.concatenate([np.arange(s, s + n) for s, n in table.columns[rows][:, [START, LENGTH]]] or [[]])
    source = source.astype(np.int64)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharding, layout_sharding = sharding or device, layout_sharding or device

    def array(name):
        stored = store.array(name)
        shape = (spec.layers, capacity, *stored.shape[2:])

        def part(index):
            layers, (first, last, _) = index[0], index[1].indices(capacity)
            taken = stored[(layers, source[first : min(last, chunks)], *index[2:])].read().result()
            short = last - first - taken.shape[1]
            return np.pad(taken, ((0, 0), (0, short), *((0, 0),) * (taken.ndim - 2))) if short else taken

        return jax.make_array_from_callback(shape, sharding, part)

    def padded(values, size, fill):
        whole = np.full(size, fill, np.int32)
        whole[: len(values)] = values
        return jax.device_put(jnp.asarray(whole), layout_sharding)

    layout = DocumentLayout(
        chunk_documents=padded(np.repeat(np.arange(len(rows)), lengths), capacity, documents),
        starts=padded(ends - lengths, documents, 0),
        lengths=padded(lengths, documents, 0),
        max_length=capacity_for(int(lengths.max(initial=1)), multiple=1),
    )
    numbers = np.full(documents, -1, np.int64)
    numbers[: len(rows)] = table.columns[rows, NAMESPACE]
    bank = MemoryBank(*(array(name) for name in ARRAYS), layout)
    return LoadedBank(bank, rows, numbers, tuple(table.namespaces))
