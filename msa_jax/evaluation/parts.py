"""Stretches of encoded memories, one behind the other, as the bank that is asked.

Sizes: L_r router layers, C chunks, N documents, K key/value heads, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from msa_jax.data import Document, Renderer
from msa_jax.memory import DocumentLayout, MemoryBank

# Documents and chunks of a part are padded to multiples of these.
_DOCUMENTS, _CHUNKS = 64, 512


class Encoded(Protocol):
    """Arrays of documents that follow each other; they may be longer than what is encoded.

    Attributes:
      keys: [L_r, C, K * D] bfloat16. content: k and v, [L_r, C, K, D] int8. scales: theirs, [L_r, K, C] float32.
      numbers, token_ends, chunk_ends, body_ends: [N] int64; where each document ends in tokens, chunks and `bodies`.
      bodies: int32, tokens of the documents' texts.
      longest: chunks of the longest document that there may be.
    """

    renderer: Renderer
    keys: np.ndarray
    content: Sequence[np.ndarray]
    scales: Sequence[np.ndarray]
    numbers: np.ndarray
    token_ends: np.ndarray
    chunk_ends: np.ndarray
    body_ends: np.ndarray
    bodies: np.ndarray
    longest: int


def _joined(pieces: Sequence[np.ndarray], room: int, axis: int, value: int = 0) -> jnp.ndarray:
    shape = list(pieces[0].shape)
    shape[axis] = room
    return jnp.asarray(np.concatenate([*pieces, np.full(shape, value, pieces[0].dtype)], axis=axis))


class Bodies(Mapping):
    """Documents by number, made of their tokens when they are read."""

    def __init__(self, renderer: Renderer, numbers: np.ndarray, offsets: np.ndarray, tokens: np.ndarray):
        self._renderer, self._numbers, self._offsets, self._tokens = renderer, numbers, offsets, tokens
        self._order = np.argsort(numbers, kind="stable")

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    def __getitem__(self, number: int) -> Document:
        found = int(np.searchsorted(self._numbers, number, sorter=self._order))
        place = self._order[found] if found < len(self._order) else -1
        if place < 0 or self._numbers[place] != number:
            raise KeyError(number)
        tokens = np.asarray(self._tokens[self._offsets[place] : self._offsets[place + 1]], np.int32)
        return Document(str(number), "", self._renderer.tokenizer.decode(tokens.tolist()).removeprefix(" "), tokens)


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of a grown memory, as it is asked.

    Attributes:
      bank: its documents, bfloat16 routing keys and int8 content.
      originals: its documents by number, in the bank's order.
      asked: which questions have their documents in it.
      tokens: rendered tokens of its documents.
    """

    bank: MemoryBank
    originals: Mapping[int, Document]
    asked: list[int]
    tokens: int


class Piece:
    """Documents `first` to `last` of a memory."""

    def __init__(self, memory: Encoded, first: int, last: int):
        since = lambda ends: np.concatenate([[0], ends[:last]])[first : last + 1]  # noqa: E731
        chunks, self.memory = since(memory.chunk_ends), memory
        self.lengths, self._chunks = np.diff(chunks).astype(np.int32), slice(int(chunks[0]), int(chunks[-1]))
        self.tokens = int(memory.token_ends[last - 1]) - (int(memory.token_ends[first - 1]) if first else 0)
        self.originals = Bodies(
            memory.renderer, np.array(memory.numbers[first:last]), since(memory.body_ends), memory.bodies
        )

    def chunks_of(self, array: np.ndarray, axis: int = 1) -> np.ndarray:
        return array[(slice(None),) * axis + (self._chunks,)]


def part_of(pieces: Sequence[Piece], asked: list[int], least: tuple[int, int]) -> Part:
    """The memory that the pieces make up, one behind the other, padded to `least` documents and chunks."""
    pieces = [piece for piece in pieces if len(piece.lengths)]
    lengths = np.concatenate([piece.lengths for piece in pieces])
    sizes, steps = (len(lengths), int(lengths.sum())), (_DOCUMENTS, _CHUNKS)
    room = [max(-size % step, few - size) for size, step, few in zip(sizes, steps, least, strict=True)]
    owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    layout = DocumentLayout(
        chunk_documents=_joined([owners], room[1], 0, len(lengths) + room[0]),
        starts=_joined([(np.cumsum(lengths) - lengths).astype(np.int32)], room[0], 0),
        lengths=_joined([lengths], room[0], 0),
        max_length=pieces[0].memory.longest,
    )

    def chunks(array_of: Callable[[Encoded], np.ndarray], axis: int = 1, value: int = 0) -> jnp.ndarray:
        return _joined([piece.chunks_of(array_of(piece.memory), axis) for piece in pieces], room[1], axis, value)

    bank = MemoryBank(
        routing_keys=chunks(lambda memory: memory.keys),
        content_k=chunks(lambda memory: memory.content[0]),
        content_v=chunks(lambda memory: memory.content[1]),
        layout=layout,
        content_k_scale=chunks(lambda memory: memory.scales[0], 2, 1),
        content_v_scale=chunks(lambda memory: memory.scales[1], 2, 1),
    )
    # A chain of mappings goes through the last one first.
    originals = ChainMap(*(piece.originals for piece in reversed(pieces)))
    return Part(bank, originals, asked, sum(piece.tokens for piece in pieces))
