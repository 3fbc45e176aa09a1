"""Documents through a model into a bank on disk and back onto the device: none is lost, mixed up or seen by others."""

import dataclasses
import time

import numpy as np
import pytest

from msa_jax.bank import document_encoder, ingest
from msa_jax.bank.document_encoder import DocumentEncoder
from msa_jax.bank.encoder import encode_bank
from msa_jax.bank.loading import load
from msa_jax.bank.manifest import BankSpec, fingerprint_of
from msa_jax.bank.reader import ARRAYS
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import BankDocument
from msa_jax.config import MSAConfig
from msa_jax.data.batch import pack_documents
from msa_jax.errors import BankError
from tests.bank.drawn import Bytes, create, rendered
from tests.bank.test_bank_encoder import P, close, model_of

TEXTS = ["one", "a second text", "three, and a bit longer", "x", "five"]


def encoder_of(**changes):
    return DocumentEncoder(model_of(), Bytes(), **dict(row_len=40, rows_per_step=2) | changes)


def documents(texts, namespace="default"):
    return [BankDocument(f"{namespace} {i}", text, namespace=namespace) for i, text in enumerate(texts)]


def direct(texts, numbers=None, row_len=40):
    """The bank of texts without a store; numbers count from 1 unless given."""
    numbers = range(1, 1 + len(texts)) if numbers is None else numbers
    packed = pack_documents(list(map(rendered, texts, numbers)), chunk_size=P, row_len=row_len)
    return encode_bank(model_of(), packed, rows_per_step=2)


def same_bank(loaded, texts, numbers=None):
    want = direct(texts, numbers)
    used = want.num_chunks
    for name in ARRAYS:
        got = np.asarray(getattr(loaded.bank, name))
        close(got[:, :used], getattr(want, name))
        assert not got[:, used:].any()
    count = len(texts)
    layout = loaded.bank.layout
    np.testing.assert_array_equal(layout.lengths[:count], want.layout.lengths)
    np.testing.assert_array_equal(layout.starts[:count], want.layout.starts)
    assert not np.asarray(layout.lengths[count:]).any()
    np.testing.assert_array_equal(layout.chunk_documents[:used], want.layout.chunk_documents)
    assert (np.asarray(layout.chunk_documents[used:]) == layout.num_documents).all()


@pytest.mark.parametrize("commit_tokens", [1, 20, 10_000])
def test_what_is_added_comes_back_onto_the_device(tmp_path, commit_tokens, monkeypatch):
    monkeypatch.setattr(ingest, "_TOKENIZED_AT_ONCE", 1)
    with create(tmp_path) as store:
        report = store.add(iter(documents(TEXTS)), encoder_of(), commit_tokens=commit_tokens)
        assert (report.added, report.unchanged) == (5, 0)
        assert report.encoded_tokens == sum(len(t) + 10 for t in TEXTS) == store.manifest.tokens
    with MemoryStore(tmp_path) as store:
        same_bank(load(store), TEXTS)


def test_rows_of_several_lengths_give_the_same_bank(tmp_path, monkeypatch):
    monkeypatch.setattr(document_encoder, "_SHORTEST", 8)
    with create(tmp_path) as store:
        encoder = encoder_of(row_len=64, rows_per_step=1)
        assert encoder.row_lens == [16, 64]
        texts = [*TEXTS, "long " * 10, "and long again " * 3, "short"]
        store.add(documents(texts), encoder)
        loaded = load(store)
    want = direct(texts, row_len=64)
    for name in ARRAYS:
        close(np.asarray(getattr(loaded.bank, name))[:, : want.num_chunks], getattr(want, name))


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    def cut():
        yield from documents(TEXTS)[:3]
        raise KeyboardInterrupt

    with create(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt):
            store.add(cut(), encoder_of(), commit_tokens=1)
        assert len(store) == 3
        report = store.add(documents(TEXTS), encoder_of())
        assert (report.added, report.unchanged) == (2, 3)
        same_bank(load(store), TEXTS)


@pytest.mark.parametrize("commit_tokens", [1, 30, 1000])
def test_equal_texts_are_encoded_once_in_a_namespace(tmp_path, commit_tokens, monkeypatch):
    monkeypatch.setattr(ingest, "_TOKENIZED_AT_ONCE", 2)
    with create(tmp_path) as store:
        twice = [*documents(TEXTS), BankDocument("again", TEXTS[1]), BankDocument("and again", TEXTS[1])]
        store.add(twice, encoder_of(), commit_tokens=commit_tokens)
        assert store.manifest.chunks == direct(TEXTS).num_chunks and len(store) == 7
        assert store.get("again").text == TEXTS[1]
        same_bank(load(store), TEXTS)
        store.add([BankDocument("again", TEXTS[1], namespace="other")], encoder_of())
        assert store.manifest.chunks == direct([*TEXTS, TEXTS[1]]).num_chunks


def test_texts_and_ids_of_commits_under_way_are_known(tmp_path, monkeypatch):
    twins = [BankDocument(f"{text} {i}", text) for text in TEXTS for i in range(2)]
    with create(tmp_path) as store:
        append = store.append
        monkeypatch.setattr(store, "append", lambda *args: (time.sleep(0.05), append(*args)))
        store.add(twins, encoder_of(), commit_tokens=1)
        assert store.manifest.chunks == direct(TEXTS).num_chunks and len(store) == 10
        with pytest.raises(BankError, match="'new' .* comes twice"):
            store.add([BankDocument("new", "new"), BankDocument("new", "newer")], encoder_of(), commit_tokens=1)


def test_updates_and_deletes_reach_the_device(tmp_path):
    with create(tmp_path) as store:
        store.add(documents(TEXTS), encoder_of())
        store.update([BankDocument("default 1", "changed")], encoder_of())
        store.delete(["default 0", "default 3"])
        same_bank(load(store), [TEXTS[2], TEXTS[4], "changed"], numbers=[3, 5, 6])


def test_bad_documents_are_named_and_nothing_of_them_is_written(tmp_path):
    with create(tmp_path) as store:
        store.add(documents(TEXTS), encoder_of())
        version = store.version
        for bad, message in [
            ([BankDocument("default 0", "other")], "'default 0' .* is there with another text: `update` it"),
            ([BankDocument("n", "new"), BankDocument("n", "new")], "'n' .* comes twice"),
            ([BankDocument("long", "y" * 31)], "'long' takes 41 tokens, .* and the limit is 40: raise row_len"),
        ]:
            with pytest.raises(BankError, match=message):
                store.add(bad, encoder_of())
        with pytest.raises(BankError, match="no document 'z' in namespace 'default': `add` it"):
            store.update([BankDocument("z", "new")], encoder_of())
        assert store.version == version
        with pytest.raises(BankError, match="multiple of the model's chunk size 4, got 25"):
            encoder_of(row_len=25)


def test_a_bank_of_before_a_setting_was_there_is_still_its_models(monkeypatch):
    now, later = fingerprint_of(model_of()), {"proportional_attention"}
    known = MSAConfig.to_dict
    monkeypatch.setattr(MSAConfig, "to_dict", lambda c: {k: v for k, v in known(c).items() if k not in later})
    assert fingerprint_of(model_of()) == now


def test_another_models_or_tokenizers_bank_is_refused(tmp_path):
    model = model_of()
    assert fingerprint_of(model) == fingerprint_of(model_of())
    assert fingerprint_of(model) == fingerprint_of(model_of(top_k_documents=2, router_bias_scale=2.0))
    assert fingerprint_of(model) != fingerprint_of(model_of(router_bias_init=4.0))
    assert fingerprint_of(model) != fingerprint_of(model_of(proportional_attention=True))
    spec = BankSpec.of(model, Bytes())
    for field, message in (("fingerprint", "made by another model .fingerprint"), ("text", "another tokenizer or doc")):
        with MemoryStore.create(tmp_path / field, dataclasses.replace(spec, **{field: "of another"})) as store:
            with pytest.raises(BankError, match=message):
                store.add(documents(TEXTS), encoder_of())
