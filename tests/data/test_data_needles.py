"""Needles: each document has its own, whole; keys are distinct, split, and partly easy to confuse."""

import itertools
import re

import numpy as np
import pytest

from msa_jax.data import NeedleSource, Renderer, Tokenizer, frequent_words, training_texts
from msa_jax.data.haystacks.keys import KeyPool, common_words
from msa_jax.errors import DataError

NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+)-([a-z]+) is: (\d{7})\.")


def rng(seed=0):
    return np.random.default_rng(seed)


def keys_of(documents):
    return [match.groups()[:2] for d in documents for match in NEEDLE.finditer(d.text)]


def make(haystack, words, tokenizer, **options):
    return NeedleSource(haystack, words, tokenizer, **{"document_tokens": 97, **options})


def test_every_question_has_its_needle_in_its_document(needles):
    episode = needles.episode(range(11), 29, rng())
    assert len(episode.documents) == 29 and len(episode.questions) == 11
    by_id = {d.id: d for d in episode.documents}
    for question in episode.questions:
        a, n, value = NEEDLE.search(by_id[question.supporting_ids[0]].text).groups()
        assert f"for {a}-{n} mentioned" in question.question
        assert question.answers == (value,)
    assert len(set(keys_of(episode.documents))) == 29
    assert len({a for q in episode.questions for a in q.supporting_ids}) == 11
    asked = {a for q in episode.questions for a in q.supporting_ids}
    assert {i for i, d in enumerate(episode.documents) if d.id in asked} != set(range(11))


def test_documents_fill_their_tokens_and_are_real_text_around_the_needle(needles, haystack, tokenizer):
    episode = needles.episode(range(7), 60, rng(1))
    renderer = Renderer(tokenizer, 97)
    plain = " ".join(" ".join(haystack).split())
    depths = []
    for document, number in zip(episode.documents, episode.numbers, strict=True):
        ids = renderer.render_document(document, number)
        assert len(ids) <= 97
        assert tokenizer.encode(" " + document.text) == document.tokens.tolist()
        before, after = NEEDLE.split(document.text)[::4]
        assert " ".join((before + after).split()) in plain
        depths.append(len(before) / (len(before) + len(after)))
    assert np.mean([len(d.tokens) for d in episode.documents]) > 0.9 * (97 - renderer.document_overhead)
    assert min(depths) < 0.2 and max(depths) > 0.8 and 0.3 < np.mean(depths) < 0.7


def test_an_index_picks_the_passage(needles):
    """The same indices with other draws: documents asked for have the same haystack, the others do not."""

    def passages(seed):
        episode = needles.episode([3, 8], 20, rng(seed))
        by_id = {d.id: NEEDLE.sub("", d.text).split()[:3] for d in episode.documents}
        return [by_id[q.supporting_ids[0]] for q in episode.questions], sorted(by_id.values())

    (first, all_first), (second, all_second) = passages(1), passages(2)
    assert first == second
    assert all_first != all_second


def test_an_episode_uses_no_passage_twice(haystack, words, tokenizer):
    source = make(haystack[:9], words, tokenizer)
    documents = source.episode([2, 4, 6], len(source), rng()).documents
    assert len({" ".join(NEEDLE.sub("", d.text).split())[:40] for d in documents}) == len(source)


def test_the_same_generator_gives_the_same_episode(needles):
    first, again, other = (needles.episode([1, 5], 13, rng(seed)) for seed in (3, 3, 4))
    assert first == again
    assert first.numbers != other.numbers and first.questions != other.questions


def test_splits_share_neither_passages_nor_asked_keys(haystack, words, tokenizer):
    options = {"eval_fraction": 0.4}
    train = make(haystack, words, tokenizer, **options)
    evaluation = make(haystack, words, tokenizer, split="eval", **options)
    passages = [{p.tobytes() for p in source._haystack.passages} for source in (train, evaluation)]
    assert passages[0].isdisjoint(passages[1])
    assert len(train) + len(evaluation) == len(make(haystack, words, tokenizer, eval_fraction=0.001))
    trained, asked, seen = set(), set(), set()
    for seed in range(12):
        trained |= set(keys_of(train.episode([0], 50, rng(seed)).documents))
        episode = evaluation.episode(range(20), 50, rng(seed))
        asked |= {tuple(re.search(r"for (\w+)-(\w+) ", q.question).groups()) for q in episode.questions}
        seen |= set(keys_of(episode.documents))
    assert trained.isdisjoint(asked)
    assert trained & seen, "in eval, distractors may have any key"


def test_needle_fraction(haystack, words, tokenizer):
    for share, expected in ((0.0, 5), (0.5, 5 + 12), (1.0, 29)):
        source = make(haystack, words, tokenizer, needle_fraction=share)
        documents = source.episode(range(5), 29, rng()).documents
        assert len(keys_of(documents)) == expected
        assert all(len(d.tokens) > 30 for d in documents)


def test_hard_keys_share_words(haystack, words, tokenizer):
    def sharing(hard_fraction):
        documents = (
            make(haystack, words, tokenizer, hard_fraction=hard_fraction).episode([0], 40, rng()).documents
        )
        pairs = itertools.combinations(keys_of(documents), 2)
        return np.mean([a[0] == b[0] or a[1] == b[1] for a, b in pairs])

    assert sharing(1.0) > 2 * sharing(0.0)


@pytest.mark.parametrize("block_size", [7, 1000])
def test_memories_are_streamed_with_distinct_keys_and_numbers(haystack, words, tokenizer, block_size):
    source = make(haystack, words, tokenizer, split="eval", eval_fraction=0.3, document_tokens=64)
    questions, blocks = source.memory(501, 13, rng(), block_size=block_size)
    blocks = list(blocks)
    assert {len(documents) for documents, _ in blocks[:-1]} <= {block_size}
    documents = [d for some, _ in blocks for d in some]
    numbers = [n for _, some in blocks for n in some]
    assert len(documents) == len(set(numbers)) == len(set(keys_of(documents))) == 501 > len(source)
    assert [d.id for d in documents] == [str(n) for n in numbers]
    texts = {d.id: d.text for d in documents}
    for question in questions:
        assert f"is: {question.answers[0]}." in texts[question.supporting_ids[0]]
    again = source.memory(501, 13, rng(), block_size=block_size)
    assert (questions, blocks) == (again[0], list(again[1]))


def test_longer_keys(haystack, words, tokenizer):
    source = make(haystack, words[:11], tokenizer, key_format="{a} {n} {p}", document_tokens=64)
    questions, blocks = source.memory(900, 5, rng(), id_digits=3)
    documents, numbers = next(blocks)
    needle = re.compile(r"One of the special magic numbers for (\w+ \w+ \w+) is: (\d{7})\.")
    found = {d.id: needle.search(d.text).groups() for d in documents}
    assert len({key for key, _ in found.values()}) == 900
    for question in questions:
        key, value = found[question.supporting_ids[0]]
        assert f" for {key} mentioned" in question.question and question.answers == (value,)
    assert max(numbers) < 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document_tokens": 40}, r"leaves \d+ tokens for text and a needle takes up to (\d+); raise"),
        ({"document_tokens": 5}, "document_len 5 leaves no room"),
        ({"key_format": "{a}{a}"}, "each once"),
        ({"key_format": "none"}, "must name its words"),
        ({"hard_fraction": 1.5}, "hard_fraction must be in 0..1"),
        ({"needle_fraction": -1}, "needle_fraction must be in 0..1"),
        ({"split": "test"}, 'split must be "train" or "eval"'),
        ({"eval_fraction": 1}, "eval_fraction must lie between"),
        ({"words": ["ba", "ba"]}, "words must be distinct"),
        ({"haystack_texts": ["ba co."]}, "has 0 passages of about 76 tokens"),
    ],
)
def test_bad_sources_are_refused(haystack, words, tokenizer, options, message):
    arguments = {"haystack_texts": haystack, "words": words, "document_tokens": 97, **options}
    with pytest.raises(DataError, match=message):
        NeedleSource(tokenizer=tokenizer, **arguments)


def test_bad_requests_are_refused(haystack, words, tokenizer, needles):
    with pytest.raises(DataError, match="5 questions need as many documents and num_documents is 4"):
        needles.episode(range(5), 4, rng())
    with pytest.raises(DataError, match=f"train split has {len(needles)} passages"):
        needles.episode([0], len(needles) + 1, rng())
    with pytest.raises(DataError, match="3 words make 9 keys"):
        make(haystack, words[:3], tokenizer).episode([0], 12, rng())
    with pytest.raises(DataError, match="distinct numbers of 1 digits"):
        needles.episode([0], 11, rng(), id_digits=1)


def test_a_document_can_be_all_needle(haystack, words, tokenizer):
    with pytest.raises(DataError) as failure:
        make(haystack, words, tokenizer, document_tokens=30)
    least = int(re.search(r"raise document_tokens to (\d+)", str(failure.value)).group(1))
    documents = make(haystack, words, tokenizer, document_tokens=least).episode([0], 30, rng()).documents
    assert len(keys_of(documents)) == 30
    assert max(len(d.tokens) for d in documents) == least - Renderer(tokenizer).document_overhead


@pytest.mark.parametrize(("asked", "others"), [(0, 1), (5, 0), (17, 300), (40, 100)])
def test_keys_are_distinct_to_the_last(words, asked, others):
    pool = KeyPool(words, "{a}-{n}", "eval", 0.25)
    drawn = pool.draw(rng(), asked, others, 0.75)
    assert drawn.shape == (asked + others, 2)
    assert len(set(map(tuple, drawn.tolist()))) == asked + others
    whole = KeyPool(words[:9], "{a}-{n}", "eval", 0.25)
    assert len(set(whole.format(whole.draw(rng(), 0, 81, 0.75)))) == 81
    with pytest.raises(DataError, match="9 words make 81 keys"):
        whole.draw(rng(), 0, 82, 0.75)


def test_frequent_words_are_single_tokens_in_keys(haystack):
    common = common_words(haystack, 500)
    assert all(re.fullmatch("[a-z]{3,10}", word) for word in common)
    counts = [sum(text.split().count(word) for text in haystack) for word in (common[0], common[-1])]
    assert counts[0] > counts[1]
    tokenizer = Tokenizer.train(training_texts(haystack, num_words=40), 900)
    words = frequent_words(haystack, tokenizer, 20)
    assert len(set(words)) == 20
    assert all(len(tokenizer.encode(f" {a}-{b}")) == 3 for a, b in itertools.pairwise(words))
    assert all(len(tokenizer.encode(f" {a} {b}")) == 2 for a, b in itertools.pairwise(words))
    with pytest.raises(DataError, match="only .* words of the texts are single tokens"):
        frequent_words(haystack, Tokenizer.train(haystack[:1], 340), 20)
