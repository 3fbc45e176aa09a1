"""Where the content K, V of a bank lies: on the device, in the host's memory, or on disk. Routing keys never move.

A router layer asks `content_of` for what it attends to. Content off the device is fetched there and then, for the
selected documents alone, into a small bank of their chunks; a document's chunks are consecutive, so from the host's
memory each is one copy by the device, which computes nothing on the host and moves nothing else.

Sizes: B questions, k documents selected, S chunks of the longest document, C chunks, K key/value heads, D head dim,
L_r router layers.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import weakref
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from msa_jax.errors import BankError
from msa_jax.memory import ContentSource, DocumentLayout, LayerMemory, MemoryBank, StoredContent
from msa_jax.memory.selection import Selection


class ContentReader(Protocol):
    """What reads content from disk. Called from threads of the runtime, so it must not call JAX."""

    def read(self, layer: int, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Content k and v, [n, K, D] each, of `chunks` [n] int64 (ascending, each once, in 0..C-1) of a layer."""


class Content(NamedTuple):
    """What one layer attends to: the arguments of `gather_attention` that have to do with the bank."""

    bank_k: jax.Array
    bank_v: jax.Array
    bank_k_scale: jax.Array | None
    bank_v_scale: jax.Array | None
    starts: jax.Array
    lengths: jax.Array
    layer: jax.Array | None
    max_length: int


_READERS: weakref.WeakValueDictionary[int, ContentReader] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def stored(reader: ContentReader, shape: tuple[int, int, int, int], dtype) -> StoredContent:
    """Content that is left on disk: `MemoryBank(keys, None, None, layout, stored=stored(...))`.

    Args:
      reader: reads it. The bank keeps it alive.
      shape: [L_r, C, K, D] of K and of V, as if they were loaded.
      dtype: of both; with int8 the bank has their scales, on the device.
    """
    number = next(_numbers)
    _READERS[number] = reader
    return StoredContent(number=jnp.int32(number), source=ContentSource(reader, shape, dtype))


def to_host(bank: MemoryBank) -> MemoryBank:
    """The bank with its content in pinned host memory; scales and routing keys stay on the device.

    Of a bank over several devices (`DocumentLayout.axes`) each has its part of the content in its own host's memory.

    Raises:
      ValueError: the content is on disk, or on several devices without `axes`.
    """
    if bank.stored is not None:
        raise ValueError("to_host: the content is on disk: load the bank with content in host memory instead.")
    if bank.layout.axes is None:
        require_one_device(bank.content_k.sharding, "host")

    def move(x):
        return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))

    return bank.replace(content_k=move(bank.content_k), content_v=move(bank.content_v))


def require_one_device(sharding: jax.sharding.Sharding, tier: str) -> None:
    """Refuse content off the device for a bank on several devices, whose layout does not say what lies where.

    Raises:
      ValueError: `tier` is not "device" and `sharding` has several devices.
    """
    if tier != "device" and sharding.num_devices > 1:
        raise ValueError(
            f"Content on the {tier} serves one device, and this bank is on {sharding.num_devices}: keep its content "
            "on the devices."
        )


def content_of(memory: LayerMemory, starts: jax.Array, lengths: jax.Array, *, origin: jax.Array | int = 0) -> Content:
    """What a layer attends to, fetched to the device if it is not there. No gradient reaches what is fetched.

    Args:
      memory: of the layer, or a device's part of it.
      starts, lengths: [B, k] int32, chunk ranges; length 0 selects nothing.
      origin: chunk of the whole bank that this part begins with; a reader on disk counts from the bank's first.
    """
    layout, tier = memory.layout, memory.tier
    longest = min(layout.max_length, layout.num_chunks)
    scales = (memory.content_k_scale, memory.content_v_scale)
    if tier == "device":
        arrays = (memory.content_k, memory.content_v)
        return Content(*arrays, *scales, starts, lengths, layer=memory.index, max_length=longest)
    lengths = jnp.clip(lengths, 0, longest)
    first = jnp.clip(starts, 0, layout.num_chunks - longest)  # of the `longest` chunks that are fetched of a document
    if tier == "disk":
        k, v = _from_disk(memory, first + origin, starts + origin, lengths, longest)
    else:
        k, v = _from_host(memory, first, longest)
    local = longest * jnp.arange(starts.size, dtype=jnp.int32).reshape(starts.shape)
    flat = lambda x: x.reshape(-1, *x.shape[3:])  # noqa: E731
    chunks = (first.reshape(-1, 1) + jnp.arange(longest, dtype=jnp.int32)[None]).reshape(-1)
    scales = tuple(None if scale is None else _scales(scale, memory.index, chunks) for scale in scales)
    # A document near the end of the bank begins after what was fetched for it begins.
    return Content(flat(k), flat(v), *scales, local + starts - first, lengths, layer=None, max_length=longest)


def _scales(scale, layer, chunks):
    """[K, n] of chunks [n]."""
    if layer is None:
        return scale[:, chunks]
    return scale.at[layer, :, chunks].get(mode="promise_in_bounds").T


def _from_host(memory, first, longest):
    """[B, k, S, K, D] k and v: of each selected document the `longest` chunks from `first`."""
    arrays = tuple(map(jax.lax.stop_gradient, (memory.content_k, memory.content_v)))
    layer = () if memory.index is None else (memory.index,)

    def one(array, start):
        place = (*layer, start, *[jnp.int32(0)] * 2)
        size = (*(1,) * len(layer), longest, *array.shape[-2:])
        part = jax.lax.dynamic_slice(array, place, size, allow_negative_indices=False)
        return jax.device_put(part, jax.memory.Space.Device).reshape(size[len(layer) :])

    def question(first):
        # Not a gather, which the device cannot do there. Apart from each other, so that the copies overlap.
        return tuple(jnp.stack([one(array, start) for start in first]) for array in arrays)

    if not first.size:
        return tuple(jnp.zeros((*first.shape, longest, *x.shape[-2:]), x.dtype) for x in arrays)
    return jax.lax.map(question, first)


def _from_disk(memory, first, starts, lengths, longest):
    source = memory.stored.source
    out = jax.ShapeDtypeStruct((*starts.shape, longest, *source.shape[2:]), source.dtype)

    def read(number, layer, first, starts, lengths):
        first, starts, lengths = (np.asarray(x, np.int64) for x in (first, starts, lengths))
        chunks = first[..., None] + np.arange(longest)
        used = (chunks >= starts[..., None]) & (chunks < (starts + lengths)[..., None])
        wanted, place = np.unique(chunks[used], return_inverse=True)
        parts = _read(int(number), int(layer), wanted, source)
        filled = tuple(np.zeros(out.shape, out.dtype) for _ in parts)
        for whole, part in zip(filled, parts, strict=True):
            whole[used] = part[place]
        return filled

    ranges = map(jax.lax.stop_gradient, (first, starts, lengths))
    return jax.pure_callback(read, (out, out), memory.stored.number, memory.index, *ranges)


def _read(number, layer, chunks, source):
    reader, shape = _READERS.get(number), (len(chunks), *source.shape[2:])
    if not len(chunks):
        return (np.zeros(shape, source.dtype),) * 2
    try:
        if reader is None:
            raise BankError("its reader is gone: keep the bank that was loaded")
        parts = reader.read(layer, chunks)
        for part in parts:
            if part.shape != shape or part.dtype != source.dtype:
                raise BankError(f"{source.dtype} {shape} was expected and {part.dtype} {part.shape} read")
    except Exception as error:
        raise BankError(f"content of router layer {layer} cannot be read from disk: {error}") from error
    return parts


@contextlib.contextmanager
def content_errors():
    """Within it, a failure to read content from disk is a `BankError` of one sentence.

    JAX by itself raises an error of its own, with the sentence at the end of a long text. Results are computed in the
    background, so wait for them inside: `with content_errors(): jax.block_until_ready(...)`.
    """
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        sentence = re.search(r"BankError: (.*)", str(error))
        if sentence is None:
            raise
        raise BankError(sentence[1]) from None


def fetch(bank: MemoryBank, selection: Selection) -> tuple[MemoryBank, Selection]:
    """What was selected, on the device: for decoding, which reads the same documents at every step.

    Args:
      bank: content anywhere; if it is on the device already, nothing is done.
      selection: [L_r, B, k] fields, as a pass of the model over `bank` gave it.

    Returns:
      A bank of L_r * B * k * S chunks' content on the device, without routing keys, and the selection that reads it:
      give both to the model. With content on the device, `bank` and `selection` as they are.

    Raises:
      ValueError: content off the device of a bank over several devices.
    """
    bank.check()
    if bank.tier == "device":
        return bank, selection
    if bank.layout.axes is not None:
        raise ValueError(
            f"fetch: this bank is spread over the mesh axes {', '.join(bank.layout.axes)}, each device reading its own "
            "part: give the bank itself to every step of decoding."
        )
    layers = jnp.arange(bank.num_layers, dtype=jnp.int32)

    def of_layer(xs):
        layer, starts, lengths = xs
        content = content_of(bank.layer_at(layer), starts, lengths)
        arrays = dict(content_k=content.bank_k, content_v=content.bank_v)
        scales = dict(content_k_scale=content.bank_k_scale, content_v_scale=content.bank_v_scale)
        return arrays | scales, content.starts, content.lengths

    arrays, starts, lengths = jax.lax.map(of_layer, (layers, selection.starts, selection.lengths))
    longest = min(bank.layout.max_length, bank.num_chunks)
    documents = jnp.arange(starts[0].size, dtype=jnp.int32)
    layout = DocumentLayout(
        chunk_documents=jnp.repeat(documents, longest, total_repeat_length=documents.size * longest),
        starts=documents * longest,
        lengths=jnp.full(documents.shape, longest, jnp.int32),
        max_length=longest,
    )
    selected = Selection(
        documents=jnp.broadcast_to(documents.reshape(starts.shape[1:]), starts.shape),
        scores=selection.scores,
        starts=starts,
        lengths=lengths,
    )
    return MemoryBank(routing_keys=None, layout=layout, **arrays), selected
