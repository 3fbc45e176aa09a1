"""A bank on disk that changes between two rounds of a question."""

import dataclasses

import numpy as np
import pytest

from msa_jax.bank import BankDocument, MemoryStore
from msa_jax.inference.corpus import StoredCorpus
from tests.inference.scripted import Scripted, full_pass, names
from tests.inference.small import ASK, ENGINE, QUESTIONS, TEXTS, encoder, model_of, renderer

Q = QUESTIONS[0]


class Between:
    """A question that reads two documents, `one` and then another, stopped before its second routing."""

    def __init__(self, path):
        self.store = MemoryStore.create(path, encoder().spec)
        self.store.add([BankDocument("first", "it goes"), *(BankDocument(f"d{n}", TEXTS[n]) for n in TEXTS)], encoder())
        self.store.delete(["first"])
        self.corpus = StoredCorpus(path)
        config = dataclasses.replace(ENGINE, slots=2, prefill_rows=1, decode_steps=1)
        self.engine = Scripted(model_of(), renderer(), self.corpus, config)
        rows = self.store.table.alive
        self.ids = dict(zip(self.store.table.columns[rows, -1].tolist(), (f"d{n}" for n in TEXTS), strict=True))
        self.best = int(self.ask([]).rounds[0].documents[0, 0])
        # A text that leaves what the question selects as it is.
        others = (number for number in self.ids if number != self.best)
        self.one = next(n for n in others if self.ask(names(n)).rounds[1].computed == "new")

    def ask(self, script, change=lambda: None):
        self.engine.scripts = {Q: script}
        self.engine.seen.clear()
        pending = self.engine.submit(Q, config=ASK)
        while script and not pending._interleave.citations:
            self.engine.step()
        change()
        while self.engine.step():
            pass
        return pending.result(timeout=0)

    def close(self):
        self.corpus.close()
        self.store.close()


@pytest.fixture
def between(tmp_path):
    made = Between(tmp_path / "bank")
    yield made
    made.close()


def told(answer):
    return [(r.documents.tolist(), r.events, r.computed) for r in answer.rounds], answer.text


def test_what_was_deleted_is_neither_routed_to_nor_read(between):
    def change():
        assert between.store.delete([between.ids[between.best]]) == 1
        assert between.corpus.follow(idle=False)
        between.engine.seen.clear()

    answer = between.ask(names(between.one) + names(between.best), change)
    assert [(e.kind, e.number) for e in answer.events[:2]] == [("read", between.one), ("unknown", between.best)]
    assert answer.rounds[1].computed == "all" and between.best not in answer.rounds[1].documents
    bank = between.corpus.bank
    visible = np.asarray(bank.layout.lengths) > 0
    for tokens, routing, _, own in between.engine.seen:
        logits, _ = full_pass(model_of(), tokens, routing, bank, visible)
        assert int(np.argmax(logits)) == own


def test_what_came_is_not_seen(between):
    script = names(between.one) + names(between.best)
    want = between.ask(script)

    def change():
        # Texts that the question and what it read would select.
        texts = [Q, *(f"{text}." for text in TEXTS.values())]
        between.store.add([BankDocument(text, text) for text in texts], encoder())
        assert between.corpus.follow(idle=False)

    assert told(between.ask(script, change)) == told(want)
    later = between.ask(script)
    assert told(later)[0][0] != told(want)[0][0]


def test_a_compacted_bank_is_read_as_it_was_until_nobody_runs(between):
    script = names(between.one) + names(between.best)
    want = between.ask(script)

    def change():
        between.store.compact()
        assert not between.corpus.follow(idle=False)

    assert told(between.ask(script, change)) == told(want)
    assert between.corpus.follow(idle=True)
    between.engine.renew()
    assert told(between.ask(script)) == told(want)
