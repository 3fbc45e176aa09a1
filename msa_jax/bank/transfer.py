"""Chunks from disk into arrays on devices, piece by piece.

The whole bank is never on the host, and a device never holds a second copy of it: a piece is written in place, in a
donated array, while the next ones are read. Every device's part is read and written for itself, so nothing crosses
devices or processes, and what a growing bank costs is what is new.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from tqdm import tqdm

from msa_jax.bank.database import refusing
from msa_jax.bank.reader import BankReader

# Bytes on disk of one piece, of one layer: enough for the disk's pace, little beside any bank.
_PIECE_BYTES = 2 << 20
# Pieces that are read at once, and as many again that wait to be written.
_READERS = 4
# A few chunks are written in all layers at once, this many at a time, and in no more than so many pieces.
_FEW, _FEW_PIECES = 64, 8


class Field(NamedTuple):
    """A stored array and what becomes of it on the device.

    Attributes:
      axes: the axis of chunks in each array made of it, by name; axis 0 is of layers.
      make: from a piece as it is stored, [l, c, ...], those arrays' pieces.
    """

    axes: Mapping[str, int]
    make: Callable[[np.ndarray], Mapping[str, np.ndarray]]


class _Part(NamedTuple):
    """Ranges of layers and chunks that one or more devices hold."""

    field: str
    layers: tuple[int, int]
    chunks: tuple[int, int]


class _Piece(NamedTuple):
    """Ranges of layers and chunks of a part, written as `size` chunks from `start` on: those before `chunks` as they
    were, those behind, which are nobody's yet, as zeros."""

    part: _Part
    layers: tuple[int, int]
    chunks: tuple[int, int]
    start: int
    size: int


def write(
    store: BankReader,
    fields: Mapping[str, Field],
    arrays: dict[str, jax.Array],
    source: np.ndarray,
    spans: Sequence[tuple[int, int]],
    *,
    progress: bool = False,
) -> None:
    """Fill ranges of chunks of every array from disk; what is behind one in a device's part may be set to zero.

    Args:
      store: an open bank.
      fields: by name of the stored array.
      arrays: by name, all that `fields` name. They are donated; the dictionary holds the new ones afterwards, even
        if reading failed half way.
      source: [C] int64, where each chunk is on disk.
      spans: (first, last) of the chunks to fill; what devices of other processes hold of them is theirs to fill.
      progress: show a progress bar of bytes read.

    Raises:
      BankError: a chunk cannot be read.
    """
    shards = {name: _shards(array) for name, array in arrays.items()}
    holders: dict[_Part, list[tuple[str, int, int, tuple[slice, ...]]]] = {}
    for stored_name, field in fields.items():
        for name, axis in field.axes.items():
            for number, shard in enumerate(arrays[name].addressable_shards):
                held = [shard.index[a].indices(arrays[name].shape[a])[:2] for a in (0, axis)]
                rest = tuple(slice(None) if a in (0, axis) else s for a, s in enumerate(shard.index))
                holders.setdefault(_Part(stored_name, *held), []).append((name, number, axis, rest))
    stored = {name: store.array(name) for name in fields}
    pieces = [piece for part in holders for span in spans for piece in _pieces(part, stored[part.field], *span)]
    total = sum(_bytes_of(piece, stored) for piece in pieces)

    def read(piece):
        with refusing(f"{store.path}: {piece.part.field} cannot be read"):
            return fields[piece.part.field].make(read_piece(stored[piece.part.field], piece, source))

    try:
        with tqdm(desc="load", total=total, unit="B", unit_scale=True, mininterval=1.0, disable=not progress) as bar:
            for piece, blocks in _ahead(pieces, read):
                layer, chunk = piece.layers[0] - piece.part.layers[0], piece.start - piece.part.chunks[0]
                numbers = np.array([layer, chunk, piece.chunks[0] - piece.start], np.int32)
                for name, number, axis, rest in holders[piece.part]:
                    shards[name][number] = write_block(shards[name][number], blocks[name][rest], numbers, axis=axis)
                # Pieces in flight are memory, so no more than those that are read ahead.
                jax.block_until_ready([shards[name][number] for name, number, *_ in holders[piece.part]])
                bar.update(_bytes_of(piece, stored))
    finally:
        for name, array in arrays.items():
            if array.sharding.num_devices == 1:
                (arrays[name],) = shards[name]
            else:
                arrays[name] = jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards[name])


def _shards(array: jax.Array) -> list[jax.Array]:
    """The parts of an array that this process holds. What is on one device is its own part, not a view of itself."""
    if array.sharding.num_devices == 1:
        return [array]
    # A view's type says that it is in the device's memory, even of what is in the host's, unless its mesh is named.
    parts = [shard.data for shard in array.addressable_shards]
    meshes = [jax.sharding.Mesh(np.array([part.device]), "one") for part in parts]
    kind = array.sharding.memory_kind
    places = [jax.sharding.NamedSharding(mesh, jax.P(), memory_kind=kind) for mesh in meshes]
    return [
        jax.make_array_from_single_device_arrays(part.shape, place, [part])
        for part, place in zip(parts, places, strict=True)
    ]


@functools.partial(jax.jit, donate_argnums=0, static_argnames="axis")
def write_block(array: jax.Array, block: jax.Array, numbers: jax.Array, *, axis: int) -> jax.Array:
    """`array` with `block` at (layer, chunk), but for the first `kept` chunks that lie there.

    Args:
      numbers: [3] int32, layer, chunk and kept: one program for every place.
    """
    # An array in the host's memory is neither read nor computed with there: pieces of it are copied.
    near, far = jax.memory.Space.Device, jax.typeof(array).memory_space
    layer, chunk, kept = numbers
    start = [layer if a == 0 else chunk if a == axis else jnp.int32(0) for a in range(array.ndim)]
    place = jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    before = jax.lax.dynamic_slice(array, start, block.shape, allow_negative_indices=False)
    block = jnp.where(place < kept, jax.device_put(before, near), block)
    return jax.lax.dynamic_update_slice(array, jax.device_put(block, far), start, allow_negative_indices=False)


def _pieces(part: _Part, stored: ts.TensorStore, first: int, last: int) -> Iterator[_Piece]:
    first, last = max(first, part.chunks[0]), min(last, part.chunks[1])
    (layer, end), room = part.layers, part.chunks[1] - part.chunks[0]
    if last - first <= _FEW * _FEW_PIECES:
        size, spans = min(_FEW, room), [part.layers]
    else:
        kept = stored.chunk_layout.read_chunk.shape[1]
        size = max(1, _PIECE_BYTES // _chunk_bytes(stored) // kept) * kept
        size, spans = min(size, room), [(i, i + 1) for i in range(layer, end)]
    for span in spans:
        for begin in range(first, last, size):
            start = min(begin, part.chunks[1] - size)
            yield _Piece(part, span, (begin, min(begin + size, last)), start, size)


def read_piece(stored: ts.TensorStore, piece: _Piece, source: np.ndarray) -> np.ndarray:
    """What is written of a piece, [l, size, ...]; zero where it has no chunks."""
    layers, wanted = slice(*piece.layers), source[slice(*piece.chunks)]
    bounds = [0, *(np.flatnonzero(np.diff(wanted) != 1) + 1), len(wanted)]
    # A run is read twice as fast as an index array, unless it shares what is stored as one piece with other runs.
    if len(bounds) == 2 or (len(bounds) - 1) * stored.chunk_layout.read_chunk.shape[1] <= len(wanted):
        runs = [stored[layers, wanted[i] : wanted[j - 1] + 1].read() for i, j in itertools.pairwise(bounds)]
    else:
        runs = [stored[layers, wanted].read()]
    if len(runs) == 1 and len(wanted) == piece.size:
        return runs[0].result()
    block = np.zeros((len(range(*piece.layers)), piece.size, *stored.shape[2:]), stored.dtype.numpy_dtype)
    at = piece.chunks[0] - piece.start
    for run in runs:
        values = run.result()
        block[:, at : at + values.shape[1]] = values
        at += values.shape[1]
    return block


def _ahead(pieces: Iterable[_Piece], read: Callable) -> Iterator[tuple[_Piece, Mapping[str, np.ndarray]]]:
    """Pieces with what was read of them, in order, read in threads a few pieces ahead."""
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        pending = collections.deque()
        for piece in pieces:
            pending.append((piece, pool.submit(read, piece)))
            if len(pending) > 2 * _READERS:
                piece, reading = pending.popleft()
                yield piece, reading.result()
        while pending:
            piece, reading = pending.popleft()
            yield piece, reading.result()


def _chunk_bytes(stored: ts.TensorStore) -> int:
    """Bytes of a chunk in one layer."""
    return stored.dtype.numpy_dtype.itemsize * int(np.prod(stored.shape[2:]))


def _bytes_of(piece: _Piece, stored: Mapping[str, ts.TensorStore]) -> int:
    chunks, layers = piece.chunks[1] - piece.chunks[0], piece.layers[1] - piece.layers[0]
    return chunks * layers * _chunk_bytes(stored[piece.part.field])
