"""Packed batches: fixed-shape arrays made of token lists. Nothing here knows what the tokens mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from msa_jax.errors import DataError

ROUTING, REPLY, TEMPLATE = 0, -1, -2
"""Roles of tokens: a question token attends and routes, the two others only attend."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DocumentBatch:
    """Documents packed into rows. Each starts at a multiple of P and none spans rows: no chunk mixes two.

    Chunks are numbered row by row, C = R * W // P of them, and those of a document are contiguous.
    """

    tokens: np.ndarray  # int32 [R, W]
    segment_ids: np.ndarray  # int32 [R, W]; 0 is padding, documents of a row are 1, 2, ...
    positions: np.ndarray  # int32 [R, W]; from 0 in each document
    chunk_documents: np.ndarray  # int32 [C]; document 0..N-1, or N where the chunk is empty
    starts: np.ndarray  # int32 [N]; first chunk of the document
    lengths: np.ndarray  # int32 [N]; chunks of the document, 0 where there is no document


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuestionBatch:
    """Questions with their replies, padded at the right."""

    tokens: np.ndarray  # int32 [B, T]
    roles: np.ndarray  # int32 [B, T]; 0 routing, -1 reply, -2 template and padding
    mask: np.ndarray  # bool [B, T]; False is padding
    loss_weights: np.ndarray  # float32 [B, T]; of token t as a target, predicted from t - 1
    visible: np.ndarray  # bool [B, N]; documents the question may see
    relevant: np.ndarray  # bool [B, N]; documents that hold the answer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    documents: DocumentBatch
    questions: QuestionBatch
    identities: np.ndarray | None = None  # int32 [N]; equal for the same document in any batch


@dataclass(frozen=True, slots=True)
class Sample:
    """One question's active context as it grows: three lists of one length, in tokens."""

    tokens: list[int]
    roles: list[int]
    weights: list[float]

    def add(self, tokens: Sequence[int], role: int = REPLY, weights: float | Sequence[float] = 0.0) -> None:
        """Append tokens of one role, with a loss weight each or one for all."""
        self.tokens.extend(tokens)
        self.roles.extend([role] * len(tokens))
        self.weights.extend(weights if isinstance(weights, Sequence) else [weights] * len(tokens))


def rows_needed(num_documents: int, document_len: int, chunk_size: int, row_len: int) -> int:
    """Rows that hold any `num_documents` documents of at most `document_len` tokens each."""
    _check_row(chunk_size, row_len)
    chunks = -(-document_len // chunk_size)
    if chunks * chunk_size > row_len:
        raise DataError(
            f"a document of {document_len} tokens takes {chunks} chunks of {chunk_size} and a row has "
            f"{row_len} tokens; raise row_len to {chunks * chunk_size} or shorten documents"
        )
    return -(-num_documents // (row_len // chunk_size // chunks))


def pack_documents(
    token_lists: Sequence[Sequence[int] | np.ndarray],
    *,
    chunk_size: int,
    row_len: int,
    num_rows: int | None = None,
    num_documents: int | None = None,
    pad_id: int = 0,
) -> DocumentBatch:
    """Packs documents in the order given, a new row whenever the next one does not fit (next-fit).

    Args:
      token_lists: one list of token ids a document; document i of the batch is `token_lists[i]`.
      chunk_size: P; documents start at its multiples.
      row_len: W, a multiple of P.
      num_rows: R; as many as needed when None.
      num_documents: N, at least `len(token_lists)`; just that when None.
      pad_id: the token that fills what is left.
    Raises:
      DataError: when a document is empty or longer than a row (it is named), or R or N is too small.
    """
    _check_row(chunk_size, row_len)
    count = len(token_lists)
    total = count if num_documents is None else num_documents
    if total < count:
        raise DataError(f"{count} documents do not fit num_documents={total}; raise it to {count}")
    sizes = np.fromiter((len(t) for t in token_lists), np.int64, count)
    if (sizes == 0).any():
        raise DataError(f"document {int(np.argmin(sizes))} has no tokens; leave empty documents out")
    if count and sizes.max() > row_len:
        worst = int(np.argmax(sizes))
        raise DataError(
            f"document {worst} has {sizes[worst]} tokens and a row only {row_len}; raise row_len or split the document"
        )
    chunks = -(-sizes // chunk_size)
    starts, used_rows = _next_fit(chunks, row_len // chunk_size)
    rows = used_rows if num_rows is None else num_rows
    if used_rows > rows:
        raise DataError(
            f"{count} documents need {used_rows} rows of {row_len} tokens and num_rows is {rows}; raise "
            "num_rows or row_len, or take fewer documents a batch"
        )
    num_chunks = rows * row_len // chunk_size
    tokens = np.full(rows * row_len, pad_id, np.int32)
    segments = np.zeros(rows * row_len, np.int32)
    positions = np.zeros(rows * row_len, np.int32)
    chunk_documents = np.full(num_chunks, total, np.int32)
    if count:
        document = np.repeat(np.arange(count), sizes)
        within = np.arange(len(document)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        place = np.repeat(starts * chunk_size, sizes) + within
        row = starts * chunk_size // row_len
        first_of_row = np.searchsorted(row, row)  # rows never decrease, so this is the row's first document
        tokens[place] = np.concatenate([np.asarray(t, np.int32) for t in token_lists])
        segments[place] = (np.arange(count) - first_of_row + 1)[document]
        positions[place] = within
        owner = np.repeat(np.arange(count), chunks)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        chunk_documents[np.repeat(starts, chunks) + offset] = owner
    padding = np.zeros(total - count, np.int64)
    shape = (rows, row_len)
    return DocumentBatch(
        tokens=tokens.reshape(shape),
        segment_ids=segments.reshape(shape),
        positions=positions.reshape(shape),
        chunk_documents=chunk_documents,
        starts=np.concatenate([starts, padding]).astype(np.int32),
        lengths=np.concatenate([chunks, padding]).astype(np.int32),
    )


def pack_parts(
    token_lists: Sequence[Sequence[int] | np.ndarray],
    parts: int,
    *,
    chunk_size: int,
    row_len: int,
    num_rows: int,
    pad_id: int = 0,
) -> DocumentBatch:
    """Packs documents in equal parts, one after the other, so that each part can lie on a device of its own.

    Document i of N is in part `i * parts // N`, with all its chunks. Otherwise as `pack_documents`.

    Args:
      num_rows: R of all parts together.
    Raises:
      DataError: as `pack_documents`, or `parts` does not divide N or R.
    """
    total = len(token_lists)
    if total % parts or num_rows % parts:
        raise DataError(f"{total} documents in {num_rows} rows cannot be packed in {parts} equal parts")
    each, rows = total // parts, num_rows // parts
    packed = [
        pack_documents(
            token_lists[i * each : (i + 1) * each], chunk_size=chunk_size, row_len=row_len, num_rows=rows, pad_id=pad_id
        )
        for i in range(parts)
    ]
    first_chunks = np.arange(parts) * (rows * row_len // chunk_size)
    owners = [np.where(p.chunk_documents < each, p.chunk_documents + i * each, total) for i, p in enumerate(packed)]
    rest = {
        name: np.concatenate([getattr(p, name) for p in packed])
        for name in ("tokens", "segment_ids", "positions", "lengths")
    }
    return DocumentBatch(
        **rest,
        chunk_documents=np.concatenate(owners).astype(np.int32),
        starts=np.concatenate([p.starts + c for p, c in zip(packed, first_chunks, strict=True)]).astype(np.int32),
    )


def pack_questions(
    samples: Sequence[Sample], *, question_len: int, visible: np.ndarray, relevant: np.ndarray, pad_id: int = 0
) -> QuestionBatch:
    """Pads samples at the right to `[B, question_len]`; `visible` and `relevant` are bool `[B, N]`.

    Raises DataError naming the sample that is longer than `question_len`, and the length it needs.
    """
    sizes = [len(s.tokens) for s in samples]
    if sizes and max(sizes) > question_len:
        worst = sizes.index(max(sizes))
        raise DataError(
            f"question {worst} of the batch takes {sizes[worst]} tokens with its reply and question_len is "
            f"{question_len}; raise question_len, or lower document_len (the reply quotes its documents)"
        )
    shape = (len(samples), question_len)
    tokens = np.full(shape, pad_id, np.int32)
    roles = np.full(shape, TEMPLATE, np.int32)
    weights = np.zeros(shape, np.float32)
    mask = np.arange(question_len) < np.asarray(sizes, np.int64).reshape(-1, 1)
    if samples:
        tokens[mask] = np.concatenate([np.asarray(s.tokens, np.int32) for s in samples])
        roles[mask] = np.concatenate([np.asarray(s.roles, np.int32) for s in samples])
        weights[mask] = np.concatenate([np.asarray(s.weights, np.float32) for s in samples])
    return QuestionBatch(tokens, roles, mask, weights, visible, relevant)


def _next_fit(chunks: np.ndarray, row_chunks: int) -> tuple[np.ndarray, int]:
    """First chunk of each document, int64 [len(chunks)], and the number of rows."""
    starts = np.empty(len(chunks), np.int64)
    cursor = 0
    for i, need in enumerate(chunks.tolist()):
        free = row_chunks - cursor % row_chunks
        if need > free:
            cursor += free
        starts[i] = cursor
        cursor += need
    return starts, -(-cursor // row_chunks)


def _check_row(chunk_size: int, row_len: int) -> None:
    if chunk_size < 1 or row_len < 1 or row_len % chunk_size:
        raise DataError(f"row_len must be a positive multiple of chunk_size, got {row_len} and {chunk_size}")
