"""The chunker: blocks joined are the text, none is too long, and they end where sentences end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_jax.data import split_text
from msa_jax.data.chunker import sentences
from msa_jax.errors import DataError

PIECES = [
    "Baco di fu. ",
    "Ge li? ",
    "mo",
    " ",
    "\n\n",
    "東京",
    "🙂",
    "é",
    "12",
    ". ",
    "A",
    'Nu "pa!" Ro se.\n',
    "x" * 40,
]


@given(
    text=st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)),
    max_tokens=st.integers(5, 40),
)
def test_blocks_join_to_the_text_and_fit(tokenizer, text, max_tokens):
    blocks = split_text(text, tokenizer, max_tokens)
    assert "".join(blocks) == text
    assert all(blocks)
    assert all(len(tokenizer.encode(" " + block)) <= max_tokens for block in blocks)


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
def test_sentences_join_to_the_text(text):
    assert "".join(sentences(text)) == text
    assert all(sentences(text))


def test_where_sentences_end():
    text = 'He went. "Where?" asked she. It cost 3.5 e.g. nothing\n\nnew paragraph! (Yes.) End'
    assert sentences(text) == [
        "He went. ",
        '"Where?" asked she. ',
        "It cost 3.5 e.g. nothing\n\n",
        "new paragraph! ",
        "(Yes.) ",
        "End",
    ]


def test_blocks_end_with_sentences_and_are_as_full_as_they_can_be(tokenizer, haystack):
    whole = set(sentences(haystack[0]))
    longest = max(len(tokenizer.encode(" " + s)) for s in whole)
    blocks = split_text(haystack[0], tokenizer, 2 * longest)
    assert len(blocks) > 3
    for block, following in zip(blocks, blocks[1:], strict=False):
        parts = sentences(following)
        assert set(sentences(block)) <= whole
        assert len(tokenizer.encode(" " + block + parts[0])) > 2 * longest


class Surcharge:
    """A tokenizer that charges two more tokens for what does not end with z: prefixes may cost more."""

    def encode(self, text):
        return [0] * (len(text) + (0 if text.endswith("z") else 2))

    def offsets(self, text):
        return [(i, i + 1) for i in range(len(text))]


def test_blocks_fit_whatever_the_tokenizer_does_to_prefixes():
    text = "zzab" * 30 + ". " + "Zab. " * 9
    blocks = split_text(text, Surcharge(), 12)
    assert "".join(blocks) == text
    assert all(len(Surcharge().encode(" " + block)) <= 12 for block in blocks)


def test_the_split_is_the_same_every_time_and_needs_room_for_a_character(tokenizer, haystack):
    assert split_text(haystack[1], tokenizer, 33) == split_text(haystack[1], tokenizer, 33)
    assert split_text("", tokenizer, 5) == []
    with pytest.raises(DataError, match="at least 5, got 4"):
        split_text("a", tokenizer, 4)
