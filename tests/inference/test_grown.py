"""A memory encoded once into files: every beginning of it is the memory that its documents alone would make."""

import numpy as np
import pytest

from msa_jax.bank import encode_bank
from msa_jax.bank.quantization import LARGEST
from msa_jax.data import Document, Question, Renderer, pack_documents
from msa_jax.errors import ConfigError, DataError
from msa_jax.evaluation.grown import GrownMemory
from msa_jax.inference import AskConfig, Budget, Engine, EngineConfig
from msa_jax.inference.library import FixedLibrary
from msa_jax.runs.open import reconfigured
from tests.inference.small import TEXTS, model_of
from tests.inference.small import renderer as whole_texts

LEN = 22
NUMBERS = [7, 40, 12, 3, 55, 21, 90]
WORDS = " ".join(TEXTS.values()).split()


@pytest.fixture(scope="module")
def renderer():
    return Renderer(whole_texts().tokenizer, LEN)


def documents():
    rng = np.random.default_rng(3)
    return [Document(f"d{n}", "", " ".join(rng.choice(WORDS, 3 + n % 5))) for n in NUMBERS]


QUESTIONS = [
    Question("q0", "where", ("north",), ("d40",)),
    Question("q1", "which", ("grey",), ("d3",)),
    Question("q2", "what", ("high",), ("d21",)),
]


def blocks(stop=None):
    made = documents()
    for first in range(0, len(made), 3):
        if first == stop:
            raise KeyboardInterrupt
        yield made[first : first + 3], NUMBERS[first : first + 3]


@pytest.fixture(scope="module")
def memory(tmp_path_factory, renderer):
    """Encoded in two goes, the second in the middle of the first's work."""
    folder = tmp_path_factory.mktemp("grown")
    first = GrownMemory(folder, model_of(), renderer, documents=len(NUMBERS))
    with pytest.raises(KeyboardInterrupt):
        first.fill(QUESTIONS, blocks(stop=6), rows_per_step=2, progress=False)
    assert first.done == 6
    again = GrownMemory(folder, model_of(), renderer, documents=len(NUMBERS))
    assert again.done == 6
    again.fill(QUESTIONS, blocks(), rows_per_step=2, progress=False)
    return GrownMemory(folder, model_of(), renderer)


def test_it_fills_until_there_are_so_many_tokens(tmp_path, renderer, memory, capsys):
    """And shows how many of those there are; what is there already is passed over, and counts."""
    half = int(memory.token_ends[3])
    some = GrownMemory(tmp_path, model_of(), renderer, documents=len(NUMBERS))
    some.fill(QUESTIONS[:2], blocks(stop=6), rows_per_step=2, tokens=half)
    assert some.done == 6 and int(memory.token_ends[2]) < half <= some.tokens
    again = GrownMemory(tmp_path, model_of(), renderer, documents=len(NUMBERS))
    again.fill(QUESTIONS, blocks(), rows_per_step=2, tokens=some.tokens + 1)
    assert again.done == len(NUMBERS) and again.tokens == memory.tokens
    shown = capsys.readouterr().err
    for wanted in (half, some.tokens + 1):
        assert f"100%|██████████| {wanted:.1f}/{wanted:.1f} [" in shown


def test_every_part_is_the_bank_of_its_documents(memory, renderer):
    texts = [renderer.render_document(d, n) for d, n in zip(documents(), NUMBERS, strict=True)]
    sizes = np.cumsum([len(t) for t in texts])
    assert memory.done == len(NUMBERS) and memory.place == {"d40": 1, "d3": 3, "d21": 5}
    for count in (6, 7):
        (part,) = memory.parts(int(sizes[count - 1]))
        assert part.asked == [0, 1, 2] and part.tokens == sizes[count - 1] and list(part.originals) == NUMBERS[:count]
        want = encode_bank(model_of(), pack_documents(texts[:count], chunk_size=4, row_len=24))
        there = int(want.num_chunks)
        layout = part.bank.layout
        np.testing.assert_array_equal(layout.lengths[:count], want.layout.lengths)
        np.testing.assert_array_equal(layout.starts[:count], want.layout.starts)
        np.testing.assert_array_equal(layout.chunk_documents[:there], want.layout.chunk_documents)
        assert not np.asarray(layout.lengths[count:]).any()
        assert (np.asarray(layout.chunk_documents[there:]) == layout.num_documents).all()
        # Half a unit in the last place of bfloat16; half a step of int8.
        np.testing.assert_allclose(np.float32(part.bank.routing_keys[:, :there]), want.routing_keys, rtol=2**-8)
        for name in ("k", "v"):
            exact = np.asarray(getattr(want, f"content_{name}"))
            scale = np.moveaxis(np.asarray(getattr(part.bank, f"content_{name}_scale"))[:, :, :there], 1, 2)[..., None]
            got = np.float32(getattr(part.bank, f"content_{name}")[:, :there]) * scale
            assert (np.abs(got - exact) <= 0.5001 * scale).all() and np.abs(got).max() > LARGEST * scale.min() / 2


def test_small_sizes_take_several_parts_of_one_shape_and_ask_every_question_once(memory, renderer):
    parts = list(memory.parts(45))
    assert len(parts) > 1 and sorted(i for p in parts for i in p.asked) == [0, 1, 2]
    assert all(p.tokens <= 45 for p in parts)
    assert len({(p.bank.num_chunks, p.bank.num_documents) for p in parts}) == 1
    for part in parts:
        for i in part.asked:
            number = int(QUESTIONS[i].supporting_ids[0][1:])
            assert number in part.originals
    with pytest.raises(DataError, match="apart from each other by over 3 tokens"):
        list(memory.parts(3))


def test_a_part_is_padded_to_the_room_that_memories_share(memory):
    (part,), (padded,) = memory.parts(10_000), memory.parts(10_000, room=(130, 1100))
    assert (padded.bank.num_documents, padded.bank.num_chunks) == (130, 1100)
    # Chunks that the longest document may have.
    assert part.bank.layout.max_length == padded.bank.layout.max_length == 24 // 4
    there = int(part.bank.layout.lengths.sum())
    lengths = [p.bank.layout.lengths[: len(NUMBERS)] for p in (part, padded)]
    np.testing.assert_array_equal(*lengths)
    assert (np.asarray(padded.bank.layout.chunk_documents[there:]) == 130).all()
    for name, array in part.bank.arrays.items():
        if array is not None:
            axis = 2 if name.endswith("scale") else 1
            cut = [np.take(np.asarray(x), np.arange(there), axis) for x in (array, getattr(padded.bank, name))]
            np.testing.assert_array_equal(*cut)


def test_a_haystack_that_memories_share_lies_behind_each(memory, renderer, tmp_path):
    """Cut in two at any document, and put together, it is the memory again."""
    made, sizes = documents(), [len(renderer.render_document(d, n)) for d, n in zip(documents(), NUMBERS, strict=True)]
    halves = []
    for name, cut, asked in (("head", slice(0, 6), QUESTIONS), ("tail", slice(6, None), [])):
        half = GrownMemory(tmp_path / name, model_of(), renderer, documents=len(made[cut]))
        half.fill(asked, [(made[cut], NUMBERS[cut])], rows_per_step=2, progress=False)
        halves.append(half)
    head, tail = halves
    for tokens, count in ((sum(sizes), 7), (sum(sizes) - 1, 6)):
        (part,), (want,) = head.parts(tokens, behind=tail), memory.parts(tokens)
        assert list(part.originals) == list(want.originals) == NUMBERS[:count]
        assert (part.asked, part.tokens) == ([0, 1, 2], sum(sizes[:count])) == (want.asked, want.tokens)
        for number in NUMBERS[:count]:
            np.testing.assert_array_equal(part.originals[number].tokens, want.originals[number].tokens)
        for name in ("starts", "lengths", "chunk_documents"):
            np.testing.assert_array_equal(getattr(part.bank.layout, name), getattr(want.bank.layout, name))
        # Rows hold other documents beside them, so that sums are rounded otherwise: one step of int8, of bfloat16.
        for name, array in want.bank.arrays.items():
            if array is not None:
                got = np.float32(getattr(part.bank, name))
                atol = 1 if array.dtype == np.int8 else 1e-6
                np.testing.assert_allclose(got, np.float32(array), rtol=2**-7, atol=atol)


def test_originals_are_read_by_number(memory, renderer):
    (part,) = memory.parts(10_000)
    for document, number in zip(documents(), NUMBERS, strict=True):
        found = part.originals[number]
        body = renderer.body(document)
        np.testing.assert_array_equal(found.tokens, body)
        assert renderer.tokenizer.encode(" " + found.text) == list(body)
    assert part.originals.get(8) is None and part.originals.get(10**9) is None
    engine = Engine(
        model_of(), renderer, FixedLibrary(part.bank, part.originals),
        EngineConfig(slots=2, context=96, lengths=(), prefill_rows=2, decode_steps=4),
    )  # fmt: skip
    answers = list(engine.ask([q.question for q in QUESTIONS], config=AskConfig(budget=Budget(answer_tokens=4))))
    named = {n for a in answers for n in a.rounds[0].documents.ravel().tolist()}
    assert named <= {*NUMBERS, -1} and named & set(NUMBERS)


def test_a_folder_of_another_memory_is_refused(memory, renderer, tmp_path):
    with pytest.raises(DataError, match="holds a memory of .*'documents': 7.* wanted is .*'documents': 9"):
        GrownMemory(memory.folder, model_of(), renderer, documents=9)
    with pytest.raises(DataError, match="holds a memory of .*'of': {}.* wanted is .*'of': {'seed': 2}"):
        GrownMemory(memory.folder, model_of(), renderer, of={"seed": 2})
    known = {"seed": 2, "run": {"tasks": ("a", "b")}}
    for _ in range(2):  # the second time as it was written
        again = GrownMemory(tmp_path / "known", model_of(), renderer, documents=2, of=known)
        again.fill([], [], rows_per_step=2, progress=False)
        again._save()
    with pytest.raises(DataError, match="holds a memory of .*'seed': 2.* wanted is .*'seed': 3"):
        GrownMemory(tmp_path / "known", model_of(), renderer, documents=2, of=known | {"seed": 3})
    with pytest.raises(DataError, match="holds no memory"):
        GrownMemory(tmp_path, model_of(), renderer)
    lacking = [Question("q", "who", (), ("d8",))]
    grown = GrownMemory(tmp_path, model_of(), renderer, documents=len(NUMBERS))
    with pytest.raises(DataError, match="lacks 1 documents that its questions need"):
        grown.fill(lacking, blocks(), rows_per_step=2, progress=False)


def test_a_model_takes_another_configuration_if_its_parameters_allow():
    other = reconfigured(model_of(), top_k=1)
    assert other.config.top_k == 1 and model_of().config.top_k == 2
    with pytest.raises(ConfigError, match="would change the parameters"):
        reconfigured(model_of(), mlp_size=24)
