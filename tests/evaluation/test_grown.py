"""A bank that grows: every beginning of it is the memory that its documents alone would make."""

import numpy as np
import pytest

from msa_jax.bank import DocumentEncoder, MemoryStore, encode_bank
from msa_jax.bank.quantization import LARGEST
from msa_jax.bank.table import NUMBER
from msa_jax.data import Document, Question, Renderer, pack_documents
from msa_jax.errors import BankError, ConfigError, DataError
from msa_jax.evaluation.grown import GrownBank
from msa_jax.inference import AskConfig, Budget, Engine, EngineConfig
from msa_jax.runs.open import reconfigured
from tests.inference.small import TEXTS, model_of
from tests.inference.small import renderer as whole_texts

LEN = 22
WORDS = " ".join(TEXTS.values()).split()
QUESTIONS = [
    Question("q0", "where", ("north",), ("d1",)),
    Question("q1", "which", ("grey",), ("d3",)),
    Question("q2", "what", ("high",), ("d5",)),
]


@pytest.fixture(scope="module")
def renderer():
    return Renderer(whole_texts().tokenizer, LEN)


@pytest.fixture(scope="module")
def encoder(renderer):
    return DocumentEncoder(model_of(), renderer.tokenizer, row_len=24, rows_per_step=2)


def documents():
    """Seven, of which the last has the text of the one before."""
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(WORDS, 3 + n % 5)) for n in range(6)]
    return [Document(f"d{n}", "", text) for n, text in enumerate([*texts, texts[-1]])]


def blocks(stop=None):
    made = documents()
    for first in range(0, len(made), 3):
        if first == stop:
            raise KeyboardInterrupt
        yield made[first : first + 3], range(first, first + 3)


@pytest.fixture(scope="module")
def bank(tmp_path_factory, renderer, encoder):
    """Encoded in two goes, the second in the middle of the first's work."""
    folder = tmp_path_factory.mktemp("grown")
    with pytest.raises(KeyboardInterrupt):
        GrownBank(folder, encoder, renderer, {"seed": 2}).fill("one", blocks(stop=6))
    again = GrownBank(folder, encoder, renderer, {"seed": 2})
    with MemoryStore(again.path) as store:
        assert len(store) == 6
    again.fill("one", blocks())
    return again


def lengths(bank):
    with MemoryStore(bank.path) as store:
        return store.table.columns[:, 2]


def beginning(bank, tokens, **more):
    (found,) = bank.parts(QUESTIONS, tokens, "one", **more)
    return found


def test_a_bank_stops_at_so_many_tokens_and_goes_on(tmp_path, renderer, encoder, bank):
    sizes = np.cumsum(lengths(bank))
    some = GrownBank(tmp_path, encoder, renderer, {})
    assert some.fill("one", blocks(stop=6), tokens=int(sizes[3])) == sizes[5]
    assert some.fill("one", blocks(), tokens=int(sizes[5]) + 1) == sizes[6]
    np.testing.assert_array_equal(lengths(some), lengths(bank))


def test_every_beginning_is_the_bank_of_its_documents(bank, renderer):
    sizes = np.cumsum(lengths(bank))
    for count in (6, 7):
        rows, asked = beginning(bank, int(sizes[count - 1]))
        np.testing.assert_array_equal(rows, np.arange(count))
        assert asked == [0, 1, 2]

        def look(corpus, questions, count=count):
            assert questions == QUESTIONS
            got, numbers = corpus.bank, corpus.numbers(np.arange(count)).tolist()
            texts = [renderer.render_document(d, n) for d, n in zip(documents()[:count], numbers, strict=True)]
            want = encode_bank(model_of(), pack_documents(texts, chunk_size=4, row_len=24))
            there = int(want.num_chunks)
            for name in ("starts", "lengths"):
                have, wish = np.asarray(getattr(got.layout, name)), np.asarray(getattr(want.layout, name))
                np.testing.assert_array_equal(have[: len(wish)][:count], wish[:count])
                assert name == "starts" or not have[count:].any()
            np.testing.assert_allclose(got.routing_keys[:, :there], want.routing_keys, rtol=1e-5, atol=1e-5)
            for name in ("k", "v"):
                exact = np.asarray(getattr(want, f"content_{name}"))
                scale = np.asarray(getattr(got, f"content_{name}_scale"))[:, :, :there]
                scale = np.moveaxis(scale, 1, 2)[..., None]
                held = np.float32(getattr(got, f"content_{name}")[:, :there]) * scale
                assert (np.abs(held - exact) <= 0.51 * scale).all() and np.abs(held).max() > LARGEST * scale.min() / 2
            view = corpus.view(None)
            for n, document in zip(numbers, documents(), strict=False):
                assert corpus.find(n, view).document.text == document.text
            return numbers

        about, numbers, wanted = bank.ask(rows, "one", QUESTIONS, look)
        assert about["tokens"] == sizes[count - 1] and about["documents"] == count
        assert len(set(numbers)) == count  # equal texts have a place each
        assert wanted == [{numbers[1]}, {numbers[3]}, {numbers[5]}]


def test_what_is_not_in_the_beginning_is_not_found(bank):
    rows, _ = beginning(bank, int(lengths(bank)[:6].sum()))
    with MemoryStore(bank.path) as store:
        last = int(store.table.columns[6, NUMBER])
    bank.ask(rows, "one", [], lambda corpus, _: corpus.find(last, corpus.view(None)) and pytest.fail("it is found"))
    everything, _ = beginning(bank, 10_000)
    assert bank.ask(everything, "one", [], lambda corpus, _: corpus.find(last, corpus.view(None)))[1]


def test_small_sizes_take_several_parts_and_ask_every_question_once(bank):
    parts = list(bank.parts(QUESTIONS, 45, "one"))
    sizes = lengths(bank)
    assert len(parts) > 1 and sorted(i for _, asked in parts for i in asked) == [0, 1, 2]
    for rows, asked in parts:
        assert sizes[rows].sum() <= 45 and all(int(QUESTIONS[i].supporting_ids[0][1:]) in rows for i in asked)
    with pytest.raises(DataError, match="apart from each other by over 3 tokens"):
        list(bank.parts(QUESTIONS, 3, "one"))


def test_memories_share_the_haystack_behind_them(tmp_path, renderer, encoder):
    made, shared = documents(), GrownBank(tmp_path, encoder, renderer, {})
    for name, some in (("one", made[:6]), ("behind", made[6:]), ("two", made[3:6])):
        shared.fill(name, [(some, range(len(some)))])
    sizes = lengths(shared)
    assert beginning(shared, int(sizes[:7].sum()), behind="behind")[0].tolist() == [*range(6), 6]
    assert beginning(shared, int(sizes[:7].sum()) - 1, behind="behind")[0].tolist() == [*range(6)]
    ((rows, asked),) = shared.parts(QUESTIONS[1:], 10_000, "two", "behind")
    assert rows.tolist() == [7, 8, 9, 6] and asked == [0, 1]
    with MemoryStore(shared.path) as store:
        assert store.verify()["whole"]


def test_it_is_asked(bank, renderer):
    config = EngineConfig(slots=2, context=96, lengths=(), prefill_rows=2, decode_steps=4)

    def ask(corpus, questions):
        engine = Engine(model_of(), renderer, corpus, config)
        numbers = set(corpus.numbers(np.arange(7)).tolist())
        answers = engine.ask([q.question for q in questions], config=AskConfig(budget=Budget(answer_tokens=4)))
        return numbers, {n for a in answers for n in a.rounds[0].documents.ravel().tolist()}

    rows, _ = beginning(bank, 10_000)
    _, (numbers, named), _ = bank.ask(rows, "one", QUESTIONS, ask)
    assert named <= {*numbers, -1} and named & numbers


def test_what_does_not_fit_is_refused(bank, renderer, encoder, tmp_path):
    with pytest.raises(DataError, match="holds a memory with other seed; use another folder"):
        GrownBank(bank.path.parent, encoder, renderer, {"seed": 3})
    other = DocumentEncoder(model_of(mlp_size=24), renderer.tokenizer, row_len=24, rows_per_step=2)
    with pytest.raises(BankError, match="another model"):
        GrownBank(bank.path.parent, other, renderer, {"seed": 2})
    with pytest.raises(DataError, match="lacks 1 documents that its questions need"):
        list(bank.parts([Question("q", "who", (), ("d8",))], 100, "one"))


def test_a_model_takes_another_configuration_if_its_parameters_allow():
    other = reconfigured(model_of(), top_k_documents=1)
    assert other.config.top_k_documents == 1 and model_of().config.top_k_documents == 2
    with pytest.raises(ConfigError, match="would change the parameters"):
        reconfigured(model_of(), mlp_size=24)
