"""Rendering: the frames come out as the template says, with the roles and weights that training needs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_jax.data import Document, LossWeights, Question, Renderer
from msa_jax.errors import DataError

DOCUMENT = Document("a", "Title", "Bacodi fuge. Limo 12!")
OTHER = Document("b", "", "Nupa rose")
QUESTION = Question("q", "Bacodi where?", ("Fuge 12", "unused"), ("a", "b"))


def number(tokenizer, value):
    return tokenizer.format_number(value)


def test_the_papers_document_and_question(plain_tokenizer):
    renderer = Renderer(plain_tokenizer)
    document = plain_tokenizer.decode(renderer.render_document(DOCUMENT, 4))
    assert document == "<|im_start|>[4]. Bacodi fuge. Limo 12![4]<|im_end|>"
    ids, roles = renderer.prompt(QUESTION.question)
    asked = (
        "\nPlease answer the question based on the above historical document information\n\nBacodi where?\n"
        "Please return all documents related to the question\n"
    )
    tail = "<|im_end|>\n<|im_start|>assistant\n<|im_start|>"
    assert plain_tokenizer.decode(ids) == asked + tail
    routing = roles.count(0)
    assert roles == [0] * routing + [-2] * (len(roles) - routing)
    assert plain_tokenizer.decode(ids[:routing]) == asked
    assert plain_tokenizer.decode(renderer.prefix) == "<|im_start|>user\n"


def weighted_runs(tokenizer, sample):
    """[(text, weight)] of the reply, neighbours of one weight together."""
    pairs = [(t, w) for t, w, r in zip(sample.tokens, sample.weights, sample.roles, strict=True) if r == -1]
    runs = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [(tokenizer.decode([t for t, _ in run]), weight) for weight, run in runs]


def test_the_papers_chain(plain_tokenizer):
    sample = Renderer(plain_tokenizer).sample(QUESTION, [(DOCUMENT, 4), (OTHER, 1203)])
    restated = "<|im_start|>The user's question is: Bacodi where?\n<|object_ref_end|>"
    assert weighted_runs(plain_tokenizer, sample) == [
        ("[4]<|object_ref_end|>", 1.0),
        ("[4]", 0.25),
        (". Bacodi fuge. Limo 12!\n<|object_ref_end|>", 0.0),
        ("[1203]<|object_ref_end|>", 1.0),
        ("[1203]", 0.25),
        (". Nupa rose\n<|object_ref_end|>", 0.0),
        ("<End-of-Retrieve>", 1.0),
        (restated, 0.0),
        ("The answer to the question is: Fuge 12<|im_end|>", 1.0),
    ]


def test_the_compact_chain_with_other_weights(tokenizer):
    weights = LossWeights(id=2.0, answer=3.0, trailing_id=0.75, leading_id=0.125)
    sample = Renderer(tokenizer, weights=weights).sample(QUESTION, [(DOCUMENT, 56)])
    spelt = number(tokenizer, 56)
    assert weighted_runs(tokenizer, sample) == [
        (spelt + "<|object_ref_end|>", 2.0),
        (spelt, 0.125),
        (". Bacodi fuge. Limo 12!", 0.0),
        (spelt, 0.75),
        ("\n<|object_ref_end|>", 0.0),
        ("<End-of-Retrieve>", 2.0),
        ("<|im_start|>Bacodi where?\n<|object_ref_end|>", 0.0),
        ("Fuge 12<|im_end|>", 3.0),
    ]
    assert (
        tokenizer.decode([t for t, r in zip(sample.tokens, sample.roles, strict=True) if r == 0])
        == "Bacodi where?\n"
    )
    assert [tokenizer.decode([t]) for t, r in zip(sample.tokens, sample.roles, strict=True) if r == -2] == [
        "<|im_start|>"
    ]


def test_a_sample_is_what_inference_renders_piece_by_piece(tokenizer, plain_tokenizer):
    for each in (tokenizer, plain_tokenizer):
        renderer = Renderer(each, document_len=30)
        sample = renderer.sample(QUESTION, [(DOCUMENT, 4), (OTHER, 9)])
        pieces = [
            renderer.prompt(QUESTION.question)[0],
            renderer.reference(4),
            renderer.appended(DOCUMENT, 4),
            renderer.reference(9),
            renderer.appended(OTHER, 9),
            renderer.end_of_retrieve(),
            renderer.restated(QUESTION.question),
            renderer.answer("Fuge 12"),
        ]
        assert sample.tokens == [t for piece in pieces for t in piece]
        assert each.parse_numbers(renderer.reference(9)) == [9]


def test_without_answers_the_reply_ends_with_retrieval(tokenizer):
    question = Question("q", "Nupa?", (), ("a",))
    sample = Renderer(tokenizer).sample(question, [(DOCUMENT, 4)])
    assert sample.tokens[-1] == tokenizer.token_id("<End-of-Retrieve>")
    assert sample.weights[-1] == 1.0


@given(text=st.text(max_size=60), value=st.integers(0, 10**7 - 1))
def test_quoted_and_encoded_documents_share_their_tokens(tokenizer, text, value):
    renderer = Renderer(tokenizer)
    document = Document("d", "", text)
    inner = renderer.render_document(document, value)[1:-1]
    appended = renderer.appended(document, value)
    assert appended[: len(inner)] == inner
    encoded = Document("d", "", text, np.asarray(tokenizer.encode(" " + text), np.int32))
    assert renderer.render_document(encoded, value)[1:-1] == inner
    assert tokenizer.decode(inner) == f"{number(tokenizer, value)}. {text}{number(tokenizer, value)}"
    assert len(inner) + 2 == renderer.document_overhead + len(renderer.body(document))


@given(st.data())
def test_users_cannot_forge_special_tokens(tokenizer, data):
    forged = data.draw(
        st.sampled_from(["<|im_end|>", "<End-of-Retrieve>", "<|0:3|>", "a<|object_ref_end|>b"])
    )
    renderer = Renderer(tokenizer)
    plain, _ = renderer.prompt("a")
    ids, roles = renderer.prompt(forged)
    specials = {tokenizer.token_id(s) for s in tokenizer.template.special_tokens}
    assert [t for t in ids if t in specials] == [t for t in plain if t in specials]
    assert roles.count(-2) == 1
    assert tokenizer.decode(ids).startswith(forged)


def test_long_documents_lose_text_but_keep_both_ids(tokenizer):
    renderer = Renderer(tokenizer, document_len=40)
    ids = renderer.render_document(Document("d", "", "Bacodi fuge. " * 50), 77)
    assert len(ids) == 40
    spelt = tokenizer.number_ids(77)
    assert ids[1 : 1 + len(spelt)] == spelt == ids[-1 - len(spelt) : -1]
    with pytest.raises(DataError, match="document_len 21 leaves no room .* take 21"):
        Renderer(tokenizer, document_len=21)
