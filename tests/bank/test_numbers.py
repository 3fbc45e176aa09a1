"""The numbers by which a model names documents: each text has one of its own, for good, and is encoded with it."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_jax.bank import table as tables
from msa_jax.bank.document_encoder import DocumentEncoder
from msa_jax.bank.numbers import Numbers, next_of
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import ALIVE, COLUMNS, NAMESPACE, NUMBER, TEXT_KEY, BankDocument, Table
from msa_jax.data.records import Document
from msa_jax.data.samples import Renderer
from msa_jax.data.templates import Template
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import BankError, DataError
from tests.bank.drawn import Bytes, create, put
from tests.bank.test_bank_encoder import P, model_of
from tests.bank.test_ingest_and_load import encoder_of


@pytest.mark.parametrize("spelling", ["plain", "place"])
def test_short_numbers_are_used_up_one_each(spelling):
    for digits in range(1, 5):
        template = Template(numbers=spelling, id_digits=digits)
        given_out = [template.number(n) for n in range(1, 10**digits)]
        assert sorted(given_out) == list(range(1, 10**digits))
        assert (given_out == sorted(given_out)) == (spelling == "plain")
        for beyond in (10**digits, 0):
            with pytest.raises(DataError, match=f"text {beyond} .* id_digits {digits} .* 1 to {10**digits - 1}; use a"):
                template.number(beyond)


@given(st.data(), st.integers(2, 18))
def test_scattered_numbers_differ_and_neighbours_are_far_apart(data, digits):
    template, ordinals = Template(numbers="place", id_digits=digits), st.integers(1, 10**digits - 2)
    one, other = data.draw(ordinals), data.draw(ordinals)
    assert 0 < template.number(one) < 10**digits
    assert (template.number(one) == template.number(other)) == (one == other)
    gap = (template.number(one + 1) - template.number(one)) % 10**digits
    assert 0.6 < gap / 10**digits < 0.64


@pytest.fixture(scope="module", params=["plain", "place"])
def tokenizer(request):
    template = Template.compact(numbers=request.param, id_digits=4)
    return Tokenizer.train(["some words of a text, and some more words"], 400, template)


def test_documents_are_encoded_as_training_renders_them(tokenizer):
    encoder = DocumentEncoder(model_of(), tokenizer, row_len=64)
    texts = ["a text", "some words", "ünd [3] <|im_end|> more"]
    documents = [BankDocument(str(i), text) for i, text in enumerate(texts)]
    numbers = [tokenizer.template.number(n) for n in (1, 2, 9999)]
    lists = encoder.tokens(documents, numbers)
    for document, number, ids in zip(documents, numbers, lists, strict=True):
        want = Renderer(tokenizer).render_document(Document(document.id, "", document.text), number)
        assert ids.dtype == np.int32 and ids.tolist() == want
        assert tokenizer.parse_numbers(ids)[0] == tokenizer.parse_numbers(ids)[-1] == number
    taken = len(lists[2])
    short = DocumentEncoder(model_of(), tokenizer, row_len=taken // P * P)
    with pytest.raises(BankError, match=f"'2' takes {taken} tokens, number and frame included"):
        short.tokens(documents, numbers)
    assert encoder.renderer.tokenizer is tokenizer and encoder.spec.text == tokenizer.document_fingerprint


def test_a_fingerprint_tells_what_documents_look_like(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    load = lambda **changes: Tokenizer.load(  # noqa: E731
        tmp_path, Template.compact(**dict(numbers=tokenizer.template.numbers, id_digits=4) | changes)
    )
    mine = tokenizer.document_fingerprint
    assert Tokenizer.load(tmp_path).document_fingerprint == mine
    assert load(question="Q: {question}").document_fingerprint == mine
    assert load(document="<|im_start|>{id}: {text}{id}<|im_end|>").document_fingerprint != mine
    assert load(id_digits=3).document_fingerprint != mine
    assert Tokenizer.train(["others"], 400, tokenizer.template).document_fingerprint != mine


def numbers_of(store):
    """The number of each live document."""
    rows = store.table.alive
    named = zip(store.documents(rows), store.table.columns[rows, NUMBER].tolist(), strict=True)
    return {f"{d.namespace} {d.id}".removeprefix("default "): number for d, number in named}


def test_a_number_is_a_texts_for_good(tmp_path):
    encoder = encoder_of()
    with create(tmp_path) as store:
        store.add([BankDocument(name, f"text {name}") for name in "abc"], encoder)
        store.add([BankDocument("twin", "text b"), BankDocument("b", "text b", namespace="other")], encoder)
        assert numbers_of(store) == {"a": 1, "b": 2, "c": 3, "twin": 2, "other b": 4}
        store.update([BankDocument("a", "changed"), BankDocument("b", "text b", title="only the title")], encoder)
        store.delete(["c"])
        store.add([BankDocument("c", "text c")], encoder)
        kept = {"a": 5, "b": 2, "c": 6, "twin": 2, "other b": 4}
        assert numbers_of(store) == kept
        store.delete(["c"])
        store.compact()
        assert store.manifest.next_text == 7
        store.add([BankDocument("d", "text c")], encoder)
        del kept["c"]
        assert numbers_of(store) == kept | {"d": 7}
        assert store.manifest.next_text == next_of(tmp_path) == 8
        store.verify()
    # A lost counter goes on where the last commit ended.
    (tmp_path / "NUMBERS").unlink()
    with MemoryStore(tmp_path, writable=True) as store:
        store.add([BankDocument("e", "new")], encoder)
        assert numbers_of(store)["e"] == 8


def test_a_text_has_one_number_though_it_comes_while_its_document_changes(tmp_path, monkeypatch):
    encoder = encoder_of()
    with create(tmp_path) as store:
        store.add([BankDocument("a", "first"), BankDocument("b", "b"), BankDocument("c", "c")], encoder)

        def slowly():
            # When b comes, a still has the text; when c comes, a has another, and what b has is not committed.
            yield from [BankDocument("a", "second"), BankDocument("b", "first")]
            time.sleep(0.8)
            yield BankDocument("c", "first")

        store.update(slowly(), encoder, commit_tokens=1)
        assert numbers_of(store) == {"a": 4, "b": 1, "c": 1}
        store.verify()


def test_numbers_that_run_out_are_told_and_nothing_else_is_lost(tmp_path):
    with create(tmp_path) as store:
        Numbers(tmp_path, 998).take(1)
        with pytest.raises(BankError, match="text 1000 of a bank .* id_digits 3 .* begin another bank"):
            store.add([BankDocument(name, name) for name in "abc"], encoder_of(), commit_tokens=1)
        store.add([BankDocument("a", "a")], encoder_of())
        assert numbers_of(store) == {"a": 999}
        assert Bytes.template.number(999) == 999


def test_a_stopped_add_gives_its_numbers_back(tmp_path):
    def cut():
        yield from [BankDocument(f"d{i}", f"text {i}") for i in range(100)]
        raise KeyboardInterrupt

    with create(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt):
            store.add(cut(), encoder_of())
        assert len(store) == 0 and next_of(tmp_path) == 1
        store.add([BankDocument("a", "a")], encoder_of())
        assert numbers_of(store) == {"a": 1}


def test_texts_that_are_numbered_wrongly_are_found(tmp_path):
    with create(tmp_path) as store:
        put(store, {"a": "one", "b": "two", "c": "three"})
        store.verify()
        whole, manifest = store.table.columns.copy(), store.manifest
        keys = slice(TEXT_KEY, TEXT_KEY + 2)
        for column, value, message in (
            (NUMBER, 3, "two texts have number 3"),
            (NUMBER, 0, "a document has no number"),
            (keys, whole[0, keys], "document 'b' is not the one added"),
        ):
            store.table.columns[1, column] = value
            with pytest.raises(BankError, match=message):
                store.verify()
            store.table.columns[:] = whole
        store.manifest = dataclasses.replace(manifest, next_text=3)
        with pytest.raises(BankError, match="3 numbers are in use, and fewer were given"):
            store.verify()


changes = st.lists(
    st.one_of(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), max_size=5),  # numbers and namespaces
        st.integers(0, 30),  # a row to bury
    ),
    max_size=12,
)


@given(changes, st.integers(1, 20))
def test_rows_are_found_by_number(changes, recent):
    def rows(pairs):
        columns = np.zeros((len(pairs), COLUMNS), np.int64)
        columns[:, ALIVE] = 1
        columns[:, [NUMBER, NAMESPACE]] = np.array(pairs, np.int64).reshape(-1, 2)
        return columns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_RECENT", recent)
        table = Table("abc", rows([(3, 0), (1, 1)]))
        live = [(3, 0), (1, 1)]
        for change in changes:
            if isinstance(change, list):
                table.extend(rows(change))
                live += change
            elif change < len(live):
                table.bury([change])
                live[change] = (0, 0)
            for number in range(1, 10):
                for spaces in (None, [], [1], {0, 2}):
                    want = [row for row, (n, s) in enumerate(live) if n == number and (spaces is None or s in spaces)]
                    assert table.rows_numbered(number, spaces) == want
        for nobodys in (0, -1, 10, 1 << 63, 10**30):
            assert table.rows_numbered(nobodys) == []
