"""The tokenizer and the template: round trips, document numbers, and files that are missing or damaged."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from msa_jax.data import Template, Tokenizer
from msa_jax.data.samples import Renderer
from msa_jax.errors import DataError


@pytest.fixture(params=["place", "plain"])
def either(request, tokenizer, plain_tokenizer) -> Tokenizer:
    return tokenizer if request.param == "place" else plain_tokenizer


@given(text=st.text())
def test_text_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batches_encode_and_decode_as_one_by_one(tokenizer, haystack):
    ids = [tokenizer.encode(text) for text in haystack[:5]]
    assert tokenizer.encode_batch(haystack[:5]) == ids
    assert tokenizer.decode_batch(ids) == haystack[:5]


def test_digits_are_single_tokens(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1984")] == list(
        "1984"
    )  # frequent in the haystack


def test_text_cannot_forge_special_tokens(either):
    forged = "".join(either.template.special_tokens)
    specials = {either.token_id(s) for s in either.template.special_tokens}
    assert specials.isdisjoint(either.encode(forged))
    assert either.decode(either.encode(forged)) == forged


def test_frames_use_special_tokens(tokenizer):
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    assert tokenizer.encode_frame("<|im_start|>ba co<|im_end|>") == [start, *tokenizer.encode("ba co"), end]


def test_training_is_deterministic_and_fills_the_vocabulary(haystack):
    first, second = (Tokenizer.train(haystack[:9], 500) for _ in range(2))
    assert first.vocab_size == 500
    assert [first.token(i) for i in range(500)] == [second.token(i) for i in range(500)]


def test_save_and_load(either, haystack, tmp_path):
    either.save(tmp_path / "new")
    either.save(tmp_path / "new")
    again = Tokenizer.load(tmp_path / "new")
    assert again.template == either.template
    assert again.vocab_size == either.vocab_size
    assert again.pad_id == either.pad_id == either.token_id(either.template.pad)
    assert again.encode_batch(haystack[:3]) == either.encode_batch(haystack[:3])
    assert again.encode("<|im_end|>") == either.encode("<|im_end|>")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["msa_template.json", "tokenizer.json"]


def test_a_failed_save_leaves_the_old_files(tokenizer, plain_tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plain_tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).template == tokenizer.template


def checkpoint(folder, *specials):
    """A tokenizer as a published checkpoint has it: its own specials, no template of ours."""
    inner = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(list(specials))
    inner.save(str(folder / "tokenizer.json"))


def test_a_checkpoint_tokenizer_gets_the_papers_template(tmp_path):
    checkpoint(
        tmp_path, "<|im_start|>", "<|im_end|>", "<|object_ref_end|>", "<End-of-Retrieve>", "<|endoftext|>"
    )
    assert Tokenizer.load(tmp_path).template == Template.paper()


def test_missing_special_tokens_are_named_at_once_and_can_be_added(tmp_path):
    checkpoint(tmp_path, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    with pytest.raises(
        DataError, match=r"no token for <\|object_ref_end\|>, <End-of-Retrieve>; .*add_missing"
    ):
        Tokenizer.load(tmp_path)
    size = Tokenizer.load(tmp_path, add_missing=True).vocab_size
    assert size == 256 + 5
    with pytest.raises(DataError, match=r"<\|0:0\|>.* and 64 more"):
        Tokenizer.load(tmp_path, Template.paper(numbers="place"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"tokenizer\.json does not exist"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json is not a tokenizer"),
        ({"tokenizer.json": None, "msa_template.json": "{"}, r"msa_template\.json: not JSON"),
        ({"tokenizer.json": None, "msa_template.json": "[]"}, "must be a JSON object"),
        ({"tokenizer.json": None, "msa_template.json": '{"ned": 1}'}, "unknown field 'ned'"),
        (
            {"tokenizer.json": None, "msa_template.json": '{"id_digits": "7"}'},
            "id_digits must be int, got '7'",
        ),
        (
            {"tokenizer.json": None, "msa_template.json": '{"document": "{text}"}'},
            "document must hold {id} {text} {id}",
        ),
    ],
)
def test_damaged_folders_are_refused(tokenizer, tmp_path, files, message):
    tokenizer.save(tmp_path)
    for name in ("tokenizer.json", "msa_template.json"):
        if name not in files:
            (tmp_path / name).unlink()
        elif files[name] is not None:
            (tmp_path / name).write_text(files[name])
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


def test_a_small_vocabulary_is_refused():
    with pytest.raises(DataError, match="alone take 331"):
        Tokenizer.train(["a"], 330)


@given(numbers=st.lists(st.integers(0, 10**7 - 1), max_size=5), text=st.text(max_size=9))
def test_numbers_round_trip(tokenizer, plain_tokenizer, numbers, text):
    for each in (tokenizer, plain_tokenizer):
        filler = each.encode(text.replace("[", "").replace("]", ""))
        spelt = [i for number in numbers for i in [*filler, *each.number_ids(number)]]
        assert each.parse_numbers(spelt) == numbers
        assert [each.decode(each.number_ids(n)) for n in numbers] == [each.format_number(n) for n in numbers]


@given(st.data())
def test_malformed_numbers_are_passed_over(tokenizer, plain_tokenizer, data):
    each = data.draw(st.sampled_from([tokenizer, plain_tokenizer]))
    whole = each.number_ids(1234567)
    drop = data.draw(st.integers(0, len(whole) - 1))
    foreign = data.draw(
        st.sampled_from([each.vocab_size, each.vocab_size + 50, -1, each.pad_id, each.encode("x")[0]])
    )
    broken = data.draw(st.sampled_from([whole[:drop], [*whole[:drop], foreign, *whole[drop:]]]))
    expected = [1234567] if broken[-len(whole) :] == whole else []
    assert each.parse_numbers(broken) == expected
    assert each.parse_numbers([*broken, *each.number_ids(89)]) == [*expected, 89]


@given(st.data())
def test_any_tokens_can_be_parsed(tokenizer, plain_tokenizer, data):
    each = data.draw(st.sampled_from([tokenizer, plain_tokenizer]))
    alphabet = [*each.number_ids(1234567), *each.number_ids(9876540), -3, each.vocab_size, each.pad_id]
    ids = data.draw(st.lists(st.sampled_from(alphabet), max_size=40))
    assert all(0 <= n < 10**7 for n in each.parse_numbers(ids))


def test_place_values_are_told_apart(tokenizer):
    assert tokenizer.format_number(4) == "[" + "".join(f"<|{p}:0|>" for p in range(6)) + "<|6:4|>]"
    swapped = tokenizer.number_ids(12)
    swapped[1], swapped[2] = swapped[2], swapped[1]
    assert tokenizer.parse_numbers(swapped) == []


@pytest.mark.parametrize("number", [-1, 10**7])
def test_numbers_out_of_range_are_refused(either, number):
    with pytest.raises(DataError, match=r"not in 0\.\.9999999"):
        either.number_ids(number)


def test_template_json_round_trip():
    template = Template.compact(id_digits=3, question="Q: {question}\n")
    assert Template.from_json(template.to_json()) == template
    assert json.loads(template.to_json())["id_digits"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad": "<|im_end|>"}, "must be distinct"),
        ({"start": ""}, "not empty"),
        ({"question": "no field"}, "question must hold {question}"),
        ({"appended": "{text}{id}"}, "appended must hold {id} {text} or {id} {text} {id}"),
        ({"reply_head": "{id}"}, "reply_head must hold no fields"),
        ({"numbers": "roman"}, '"plain" or "place"'),
        ({"id_digits": 0}, "id_digits must be in"),
        ({"reference": "{id}"}, "reference must end with"),
    ],
)
def test_bad_templates_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        Template.paper(**changes)


def test_ids_of_other_widths(haystack):
    narrow = Tokenizer.train(haystack[:3], 400, Template.compact(id_digits=2))
    assert narrow.max_number_len == 4
    assert narrow.parse_numbers(narrow.number_ids(7)) == [7]
    assert Renderer(narrow).document_overhead == 2 * 4 + 3
