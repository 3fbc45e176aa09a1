"""Where a bank's content lies, how it is quantised, over how many devices it is spread: the answers are the same."""

import dataclasses
import functools
import os
import subprocess
import sys

import numpy as np
import pytest

from msa_jax.bank import MemoryStore
from msa_jax.bank.table import BankDocument
from msa_jax.inference import AskConfig
from msa_jax.inference.corpus import StoredCorpus
from tests.inference.scripted import Scripted, full_pass, names
from tests.inference.small import BUDGET, ENGINE, QUESTIONS, TEXTS, corpus_of, encoder, model_of, renderer

TWO = dataclasses.replace(ENGINE, slots=2, prefill_rows=1, decode_steps=1)
CONFIGS = [AskConfig(budget=BUDGET), AskConfig(mode="router", router_documents=2, budget=BUDGET)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiers") / "bank"
    with MemoryStore.create(path, encoder().spec) as store:
        spaces = ["few", "few", "rest", "rest", "rest"]
        store.add([BankDocument(f"d{n}", TEXTS[n], namespace=s) for n, s in zip(TEXTS, spaces, strict=True)], encoder())
    return path


def answers(corpus, numbers):
    """With texts that are read round by round, those of one namespace among them."""
    engine = Scripted(model_of(), renderer(), corpus, TWO)
    engine.scripts = {QUESTIONS[0]: names(numbers[0]) + names(numbers[4]), QUESTIONS[1]: names(*numbers[:2])}
    pending = [
        engine.submit(question, config=config, namespaces=namespaces)
        for config in CONFIGS for namespaces in (None, ["few"]) for question in QUESTIONS[:3]
    ]  # fmt: skip
    while engine.step():
        pass
    return [one.result(timeout=0) for one in pending]


def alike(got, want, atol=0.0):
    for one, other in zip(got, want, strict=True):
        assert (one.text, one.outcome, one.completion_tokens) == (other.text, other.outcome, other.completion_tokens)
        assert [c.id for c in one.citations] == [c.id for c in other.citations]
        for mine, theirs in zip(one.rounds, other.rounds, strict=True):
            # Of a bank that is spread, what is selected is told, and no more.
            told = mine.documents.shape[1]
            np.testing.assert_array_equal(mine.documents, theirs.documents[:, :told])
            np.testing.assert_allclose(mine.scores, theirs.scores[:, :told], atol=atol)
            assert (mine.computed, mine.why) == (theirs.computed, theirs.why)


@functools.cache
def on_one_device(path, **options):
    corpus = StoredCorpus(path, **options)
    numbers = corpus.numbers(np.arange(5)).tolist()
    found = answers(corpus, numbers)
    corpus.close()
    return found, numbers


def test_a_stored_bank_answers_and_reads(path):
    found, numbers = on_one_device(path)
    assert min(numbers) > 0
    # Read round by round, and of those questions that may see all documents more than one.
    assert [len(a.citations) for a in found[:2]] == [2, 2] and [len(a.citations) for a in found[3:5]] == [1, 2]
    assert {r.computed for a in found for r in a.rounds[1:]} == {"all", "new"}
    assert len({a.text for a in found}) > 6


@pytest.mark.parametrize("content", ["host", "disk"])
def test_content_off_the_device(path, content):
    want, numbers = on_one_device(path)
    corpus = StoredCorpus(path, content=content)
    assert corpus.bank.tier == content
    alike(answers(corpus, numbers), want, atol=1e-6)
    corpus.close()


def test_int8():
    """As a pass over the whole context computes it, from the same bank."""
    corpus = corpus_of("int8")
    engine = Scripted(model_of(), renderer(), corpus, dataclasses.replace(TWO, slots=1))
    engine.scripts = {QUESTIONS[0]: names(4) + names(30)}
    (answer,) = engine.ask(QUESTIONS[:1], config=CONFIGS[0])
    assert [c.number for c in answer.citations] == [4, 30]
    for tokens, routing, visible, own in engine.seen:
        logits, _ = full_pass(model_of(), tokens, routing, corpus.bank, visible)
        assert int(np.argmax(logits)) == own


@pytest.mark.slow
def test_on_eight_devices(root):
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/inference/on_eight_devices.py"]
    run = subprocess.run(command, cwd=root, env=os.environ | devices, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout
