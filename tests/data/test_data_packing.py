"""Packing: every token arrives, nothing is mixed, and what cannot fit is refused by name."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_jax.data.batch import Batch, Sample, pack_documents, pack_parts, pack_questions, rows_needed
from msa_jax.errors import DataError

PAD = 999


def tokens_of(sizes):
    """Documents whose tokens tell the document and the place: 1000 * i + place."""
    return [np.arange(size) + 1000 * (i + 1) for i, size in enumerate(sizes)]


@st.composite
def packings(draw):
    chunk = draw(st.sampled_from([1, 3, 8]))
    row_chunks = draw(st.integers(1, 7))
    sizes = draw(st.lists(st.integers(1, chunk * row_chunks), max_size=23))
    return chunk, chunk * row_chunks, sizes, draw(st.integers(0, 3)), draw(st.integers(0, 2))


@given(packings())
def test_packed_documents_can_be_read_back(case):
    chunk, row_len, sizes, absent, spare_rows = case
    documents = tokens_of(sizes)
    rows = pack_documents(documents, chunk_size=chunk, row_len=row_len).tokens.shape[0] + spare_rows
    count = len(documents) + absent
    batch = pack_documents(
        documents, chunk_size=chunk, row_len=row_len, num_rows=rows, num_documents=count, pad_id=PAD
    )
    assert batch.tokens.shape == batch.segment_ids.shape == batch.positions.shape == (rows, row_len)
    assert batch.chunk_documents.shape == (rows * row_len // chunk,)
    assert batch.starts.shape == batch.lengths.shape == (count,)
    flat, positions = batch.tokens.reshape(-1, chunk), batch.positions.reshape(-1, chunk)
    owners = np.full(len(flat), count)
    for i, document in enumerate(documents):
        chunks = slice(batch.starts[i], batch.starts[i] + batch.lengths[i])
        assert flat[chunks].ravel()[: len(document)].tolist() == document.tolist()
        assert (flat[chunks].ravel()[len(document) :] == PAD).all()
        assert positions[chunks].ravel()[: len(document)].tolist() == list(range(len(document)))
        assert batch.starts[i] * chunk // row_len == (batch.starts[i] * chunk + len(document) - 1) // row_len
        owners[chunks] = i
    assert batch.chunk_documents.tolist() == owners.tolist()
    assert not batch.lengths[len(documents) :].any()
    # Segments: 0 just where no document is, and 1, 2, ... in each row, one a document.
    assert ((batch.segment_ids == 0) == (batch.tokens == PAD)).all()
    for row, segments in enumerate(batch.segment_ids):
        present = sum(s * chunk // row_len == row for s in batch.starts[: len(documents)])
        assert sorted(set(segments.tolist()) - {0}) == list(range(1, present + 1))
        assert (np.diff(segments[segments > 0]) >= 0).all()


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.data())
def test_parts_are_equal_and_hold_their_documents_whole(parts, each, spare_rows, data):
    chunk, row_len = 3, 12
    sizes = data.draw(st.lists(st.integers(1, row_len), min_size=parts * each, max_size=parts * each))
    documents = tokens_of(sizes)
    rows = parts * (each + spare_rows)
    batch = pack_parts(documents, parts, chunk_size=chunk, row_len=row_len, num_rows=rows, pad_id=PAD)
    chunks = rows * row_len // chunk // parts
    flat, owners = batch.tokens.reshape(-1, chunk), np.full(parts * chunks, len(documents))
    for i, document in enumerate(documents):
        own = slice(batch.starts[i], batch.starts[i] + batch.lengths[i])
        assert flat[own].ravel()[: len(document)].tolist() == document.tolist()
        assert own.start // chunks == (own.stop - 1) // chunks == i // each
        owners[own] = i
    assert batch.chunk_documents.tolist() == owners.tolist()
    one = pack_documents(documents, chunk_size=chunk, row_len=row_len, num_rows=rows, pad_id=PAD)
    if parts == 1:
        jax.tree.map(np.testing.assert_array_equal, batch, one)


@given(packings())
def test_documents_keep_their_order_and_rows_are_filled_before_the_next_begins(case):
    chunk, row_len, sizes, _, _ = case
    batch = pack_documents(tokens_of(sizes), chunk_size=chunk, row_len=row_len)
    cursor = 0
    for size, start in zip(sizes, batch.starts.tolist(), strict=True):
        if cursor % row_len + size > row_len:
            cursor = (cursor // row_len + 1) * row_len
        assert start * chunk == cursor
        cursor += -(-size // chunk) * chunk
    assert batch.tokens.shape[0] == -(-cursor // row_len)


@given(packings(), st.integers(0, 7))
def test_rows_needed_is_enough_whatever_the_lengths(case, extra):
    chunk, row_len, sizes, _, _ = case
    longest = min(max(sizes, default=1) + extra, row_len)
    rows = rows_needed(len(sizes), longest, chunk, row_len)
    packed = pack_documents(tokens_of(sizes), chunk_size=chunk, row_len=row_len, num_rows=rows)
    assert packed.tokens.shape == (rows, row_len) and (packed.segment_ids > 0).sum() == sum(sizes)


def test_rows_needed_is_exact_for_documents_of_full_length():
    # Chunks of 5, documents of 3 chunks, rows of 7 chunks: two a row.
    assert rows_needed(5, 13, 5, 35) == 3
    with pytest.raises(DataError, match="num_rows is 2"):
        pack_documents(tokens_of([13] * 5), chunk_size=5, row_len=35, num_rows=2)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([3, 13, 2], {}, "document 1 has 13 tokens and a row only 12"),
        ([3, 0, 2], {}, "document 1 has no tokens"),
        ([3, 2], {"num_documents": 1}, "raise it to 2"),
        ([9, 9], {"num_rows": 1}, "need 2 rows of 12 tokens and num_rows is 1"),
        ([3], {"row_len": 13}, "multiple of chunk_size"),
        ([3], {"chunk_size": 0}, "multiple of chunk_size"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, options, message):
    with pytest.raises(DataError, match=message):
        pack_documents(tokens_of(sizes), **{"chunk_size": 4, "row_len": 12, **options})


def test_questions_are_padded_at_the_right():
    samples = [Sample([5, 6, 7], [0, 0, -1], [0.0, 0.0, 0.5]), Sample([8], [-2], [0.25])]
    visible = np.ones((2, 3), bool)
    relevant = np.eye(2, 3, dtype=bool)
    batch = pack_questions(samples, question_len=5, visible=visible, relevant=relevant, pad_id=PAD)
    assert batch.tokens.tolist() == [[5, 6, 7, PAD, PAD], [8, PAD, PAD, PAD, PAD]]
    assert batch.roles.tolist() == [[0, 0, -1, -2, -2], [-2] * 5]
    assert batch.mask.tolist() == [[True, True, True, False, False], [True, False, False, False, False]]
    assert batch.loss_weights.tolist() == [[0, 0, 0.5, 0, 0], [0.25, 0, 0, 0, 0]]
    assert batch.relevant is relevant
    dtypes = {field.name: getattr(batch, field.name).dtype.name for field in dataclasses.fields(batch)}
    assert dtypes == {
        "tokens": "int32",
        "roles": "int32",
        "mask": "bool",
        "loss_weights": "float32",
        "visible": "bool",
        "relevant": "bool",
    }
    with pytest.raises(DataError, match=r"question 0 of the batch takes 3 tokens .* question_len is 2"):
        pack_questions(samples, question_len=2, visible=visible, relevant=relevant)


def test_batches_are_pytrees_that_jit_takes():
    documents = pack_documents(tokens_of([3, 5]), chunk_size=4, row_len=12)
    visible = np.ones((1, 2), bool)
    questions = pack_questions([Sample([5], [0], [0.0])], question_len=2, visible=visible, relevant=visible)
    batch = Batch(documents, questions)
    assert len(jax.tree.leaves(batch)) == 12
    assert all(leaf.dtype in (np.int32, np.float32, np.bool_) for leaf in jax.tree.leaves(batch))
    doubled = jax.jit(lambda b: jax.tree.map(lambda x: x + x, b))(batch)
    assert (np.asarray(doubled.documents.tokens) == 2 * documents.tokens).all()
