"""The pipeline: static shapes, the same batches every time, kept positions, processes that differ."""

import itertools

import jax
import numpy as np
import pytest

from msa_jax.data import JsonlSource, Renderer, Template, Tokenizer
from msa_jax.data.pipeline import make_dataset
from msa_jax.errors import DataError

SIZES = {
    "num_documents": 13,
    "num_questions": 3,
    "chunk_size": 5,
    "row_len": 105,
    "question_len": 240,
    "seed": 4,
}


def dataset(source, tokenizer, **options):
    return make_dataset(source, tokenizer, **{**SIZES, "document_len": 40, **options})


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def asked(tokenizer, batch):
    """The questions of a batch, as text."""
    routing = batch.questions.roles == 0
    return [tokenizer.decode(t[r]).strip() for t, r in zip(batch.questions.tokens, routing, strict=True)]


def test_batches_have_one_static_shape_and_mean_what_the_source_says(corpus, tokenizer):
    questions = {q.question: q for q in corpus.questions}
    renderer = Renderer(tokenizer, 40)
    shapes = set()
    for batch in itertools.islice(dataset(corpus, tokenizer), 7):
        shapes.add(str(jax.tree.map(np.shape, batch)))
        documents = batch.documents
        flat = documents.tokens.reshape(-1, 5)
        numbers = {}
        for i, (start, length) in enumerate(zip(documents.starts, documents.lengths, strict=True)):
            first, last = tokenizer.parse_numbers(flat[start : start + length].ravel())
            assert first == last
            numbers[i] = first
        assert len(set(numbers.values())) == 13
        assert batch.questions.visible.all()
        for row, text in enumerate(asked(tokenizer, batch)):
            question = questions[text]
            tokens = batch.questions.tokens[row][batch.questions.mask[row]]
            named = tokenizer.parse_numbers(tokens)[::3]  # each is named once and quoted between two ids
            assert len(named) == len(question.supporting_ids) == 2
            assert set(named) == {numbers[i] for i in np.flatnonzero(batch.questions.relevant[row])}
            expected = renderer.answer(question.answers[0])
            assert tokens[-len(expected) :].tolist() == expected
    assert len(shapes) == 1
    # Documents of 8 chunks, two a row of 21 chunks: 7 rows.
    assert batch.documents.tokens.shape == (7, 105)
    assert batch.documents.chunk_documents.shape == (7 * 21,)
    assert batch.questions.tokens.shape == (3, 240)
    assert batch.questions.relevant.shape == (3, 13)


def test_the_same_arguments_give_the_same_batches(needles, tokenizer):
    def first(**options):
        return list(itertools.islice(dataset(needles, tokenizer, document_len=97, **options), 3))

    one, again = first(), first(num_threads=1, prefetch=1)
    assert all(map(same, one, again))
    assert not same(one[0], one[1])
    assert not same(one[0], first(seed=5)[0])


def test_a_kept_position_continues_identically(needles, tokenizer):
    options = {"document_len": 97, "question_len": 200}
    iterator = iter(dataset(needles, tokenizer, **options))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    for restored in (iterator, iter(dataset(needles, tokenizer, **options))):
        restored.set_state(state)
        assert all(same(next(restored), batch) for batch in expected)


def test_an_epoch_asks_every_question_once_over_all_processes(tmp_path, corpus_folder, tokenizer):
    source = JsonlSource(corpus_folder, eval_fraction=0.01)
    assert len(source) == 17
    streams = [
        iter(dataset(source, tokenizer, process_index=i, process_count=2, num_questions=1)) for i in range(2)
    ]
    batches = [[next(stream) for _ in range(17)] for stream in streams]
    # Process i asks the questions at i, i + 2, ... of the endless stream, so 17 + 17 are two epochs.
    order = [
        text for pair in zip(*batches, strict=True) for batch in pair for text in asked(tokenizer, batch)
    ]
    everything = sorted(q.question for q in source.questions)
    assert sorted(order[:17]) == sorted(order[17:]) == everything
    assert order[:17] != order[17:]
    assert set(order[:16:2]).isdisjoint(order[1:16:2])
    # The documents' numbers differ between processes too.
    numbers = [set(tokenizer.parse_numbers(some[0].documents.tokens.ravel())) for some in batches]
    assert len(numbers[0] & numbers[1]) < 3


def test_more_questions_than_the_source_has_are_asked_again(corpus, tokenizer):
    many = len(corpus) + 5
    batch = next(iter(dataset(corpus, tokenizer, num_questions=many, num_documents=23)))
    assert len(set(asked(tokenizer, batch))) == len(corpus)
    assert batch.questions.relevant.sum(1).tolist() == [2] * many


def test_another_seed_asks_in_another_order(corpus, tokenizer):
    orders = []
    for seed in (0, 1):
        batches = itertools.islice(dataset(corpus, tokenizer, seed=seed), 3)
        orders.append([text for batch in batches for text in asked(tokenizer, batch)])
    assert orders[0] != orders[1]


def test_numbers_have_the_templates_digits(corpus, haystack):
    narrow = Tokenizer.train(haystack[:5], 500, Template.compact(id_digits=2))
    batch = next(iter(dataset(corpus, narrow)))
    numbers = set(narrow.parse_numbers(batch.documents.tokens.ravel()))
    assert len(numbers) == 13 and max(numbers) > 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_len": 104}, "multiple of chunk_size"),
        ({"document_len": 106}, "takes 22 chunks of 5 and a row has 105 tokens; raise row_len to 110"),
        ({"document_len": 21}, "document_len 21 leaves no room"),
        ({"num_rows": 2}, "need . rows of 105 tokens and num_rows is 2"),
        ({"question_len": 60}, r"takes \d+ tokens with its reply and question_len is 60"),
        ({"num_documents": 3}, "supporting documents and num_documents is 3"),
        ({"num_documents": 24}, "the source has 23 documents"),
        ({"num_questions": 0}, "must be at least 1"),
        ({"process_index": 2, "process_count": 2}, "process_index must be in"),
        ({"process_count": 99}, "cannot be shared by 99 processes"),
    ],
)
def test_what_cannot_work_fails_when_the_dataset_is_made(corpus, tokenizer, options, message):
    with pytest.raises(DataError, match=message):
        dataset(corpus, tokenizer, **options)
