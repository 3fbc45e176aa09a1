"""What is shown of an answer while it is written."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_jax.data import Template, Tokenizer
from msa_jax.inference.reply import Reply

TEMPLATES = {
    "compact": Template.compact,
    "paper": Template,
    "chinese": functools.partial(Template.chinese, pad="<|pad|>"),
}


@functools.cache
def tokenizer(name):
    texts = ["the answer to the question is: north", "ab abc 東京 the river "] * 3
    return Tokenizer.train(texts, 300 if name != "compact" else 420, TEMPLATES[name]())


def words(name):
    """What the template has before the answer."""
    return TEMPLATES[name]().reply_answer.partition("{answer}")[0]


def shown(name, tokens, stop, at_once=1):
    """The text as of each write and at the end, which each are what was shown by then; and whether it stopped."""
    pieces, texts = [], []
    reply = Reply(tokenizer(name), stop, pieces.append)
    for begin in range(0, len(tokens), at_once):
        reply.write(tokens[begin : begin + at_once])
        texts.append("".join(pieces))
        assert reply.text == texts[-1]
        if reply.stopped:
            break
    reply.end()
    assert reply.text == "".join(pieces) and "" not in pieces
    return [*texts, reply.text], reply.stopped


def expected(name, tokens, stop):
    """The text and whether a stop string ended it, from all that was written, token by token."""
    before = words(name)
    for size in [*range(1, len(tokens) + 1), None]:
        text = tokenizer(name).decode(tokens[:size], skip_special=True).lstrip()
        if size is not None and before and before.startswith(text.rstrip("\ufffd").rstrip()):
            continue
        text = text.removeprefix(before).lstrip()
        found = [text.index(s) for s in stop if s in text]
        if found:
            return text[: min(found)].rstrip(), True
    return text.rstrip(), False


@pytest.mark.parametrize("name", TEMPLATES)
@given(data=st.data())
def test_what_was_shown_is_never_taken_back(name, data):
    ids = st.integers(0, tokenizer(name).vocab_size - 1)
    text = data.draw(st.text("ab c東京\n:", max_size=12))
    tokens = tokenizer(name).encode(data.draw(st.sampled_from(["", words(name), words(name)[:5]])) + text)
    tokens += data.draw(st.lists(ids, max_size=4))
    stop = tuple(data.draw(st.lists(st.text("ab 東京\n", min_size=1, max_size=3), max_size=2)))
    texts, stopped = shown(name, tokens, stop)
    assert (texts[-1], stopped) == expected(name, tokens, stop)
    assert all(texts[-1].startswith(text) for text in texts)


def test_a_stop_string_is_held_back_until_it_is_over():
    spell = lambda text: [token for c in text for token in tokenizer("paper").encode(c)]  # noqa: E731
    assert shown("paper", spell("xa東y"), ("a東",)) == (["x", "x", "x", "x", "x"], True)
    assert shown("paper", spell("xay"), ("ab",)) == (["x", "x", "xay", "xay"], False)
    assert shown("paper", spell("xa"), ("ab",)) == (["x", "x", "xa"], False)


@pytest.mark.parametrize("name", ["paper", "chinese"])
def test_the_templates_words_are_not_the_answer(name):
    spelt = tokenizer(name).encode(words(name) + "north")
    texts, _ = shown(name, spelt, ())
    assert texts[-1] == "north" and set("".join(texts)) <= set("north")
    # Words that begin like it are.
    assert shown(name, tokenizer(name).encode(words(name)[:3] + "x"), ())[0][-1] == words(name)[:3] + "x"
    assert shown(name, tokenizer(name).encode(words(name)[:3]), ())[0][-1] == words(name)[:3]


def test_whitespace_around_an_answer_is_not_shown():
    assert shown("compact", tokenizer("compact").encode(" \n ab  c \n"), ())[0][-1] == "ab  c"
