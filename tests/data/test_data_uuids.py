"""Uuids: drawn as the standard says, and cut into the same twenty tokens wherever they stand."""

import re
import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_jax.data import Tokenizer, training_texts
from msa_jax.data.haystacks.uuids import draw_uuids, word_pattern


@pytest.fixture(scope="module")
def pairing(haystack) -> Tokenizer:
    texts = [*training_texts(haystack, num_words=60), *draw_uuids(np.random.default_rng(1), 2500)]
    return Tokenizer.train(texts, 1300, word_pattern=word_pattern())


def test_uuids_are_of_version_four_and_drawn_anew():
    drawn = draw_uuids(np.random.default_rng(0), 400)
    assert len(set(drawn)) == 400
    assert all(str(uuid.UUID(one)) == one and uuid.UUID(one).version == 4 for one in drawn)
    assert drawn == draw_uuids(np.random.default_rng(0), 400)
    assert draw_uuids(np.random.default_rng(0), 0) == []


@given(
    value=st.uuids(),
    before=st.sampled_from(["", " ", "for ", "is: ", "(", "1", "x\n"]),
    after=st.sampled_from(["", ".", " is"]),
)
def test_a_uuid_is_sixteen_pairs_wherever_it_stands(pairing, value, before, after):
    spelt = [pairing.decode([i]) for i in pairing.encode(f"{before}{value}{after}")]
    assert "".join(spelt) == f"{before}{value}{after}"
    pieces = re.findall("[0-9a-f]{2}|-", str(value))
    assert len(pieces) == 20
    assert any(spelt[i : i + 20] == pieces for i in range(len(spelt)))


@given(text=st.text() | st.from_regex(r"[0-9a-f]{2,9}(-[0-9a-f]{4})?", fullmatch=True))
def test_other_text_is_cut_as_ever(pairing, text):
    """Digits stay alone, words stay words: only within uuids are there tokens of two digits."""
    ids = pairing.encode(text)
    assert pairing.decode(ids) == text
    assert not [t for t in map(pairing.token, ids) if len(t) > 1 and re.search("[0-9]", t)]


def test_without_uuids_the_tokenizer_is_the_usual_one(haystack):
    texts = list(training_texts(haystack, num_words=60))
    usual, pairing = Tokenizer.train(texts, 700), Tokenizer.train(texts, 700, word_pattern=word_pattern())
    assert [usual.token(i) for i in range(700)] == [pairing.token(i) for i in range(700)]
    for text in [*haystack[:9], "don't  say\n\n 12 times,3x or [4]!"]:
        assert usual.encode(text) == pairing.encode(text)
