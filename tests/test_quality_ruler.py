"""RULER's evaluation: a bank that grows is the bank of its documents; scores, tables and shares of what is kept."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.quality import ruler, ruler_report
from benchmarks.quality.ruler_memory import GrowingBank
from msa_jax import MSAConfig, MSATransformer
from msa_jax.bank import encode_bank
from msa_jax.bank.quantization import quantize
from msa_jax.data import Document, Question, Renderer, Template, Tokenizer, pack_documents
from msa_jax.data.sources.ruler_tasks import TASKS

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


@pytest.fixture(scope="module")
def made():
    """A model, its renderer, and documents of many lengths with their numbers."""
    template = Template.compact(id_digits=2)
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 9, 256 + len(template.special_tokens) + 40, template)
    config = MSAConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_size=8, chunk_size=8, top_k=2, position_offset=3, router_layers=(1,),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, n)) for n in (3, 11, 1, 7, 14, 2, 9)]
    documents = [Document(str(i), "", text) for i, text in enumerate(texts)]
    # Parameters from NumPy: a model's own initialisation takes longer than all the rest.
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), state)
    return nnx.merge(graphdef, params), Renderer(tokenizer, 32), documents, [40, 7, 99, 0, 13, 52, 21]


@pytest.mark.parametrize("int8", [False, True])
def test_a_bank_that_grows_is_the_bank_of_its_documents(made, int8):
    model, renderer, documents, numbers = made
    whole = pack_documents(
        [renderer.render_document(d, n) for d, n in zip(documents, numbers, strict=True)], chunk_size=8, row_len=32
    )
    want = encode_bank(model, whole, rows_per_step=4)
    want = quantize(want) if int8 else want
    grown = GrowingBank(model, renderer, 32, int8=int8)
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        grown.add(documents[part], numbers[part], rows_per_step=4)
        bank = grown.bank(100)
        bank.check()
        assert bank.num_documents > len(grown.documents)
        assert int((np.asarray(bank.layout.lengths) > 0).sum()) == len(grown.documents) == part.stop
    assert list(grown.documents) == numbers and grown.documents[13] is documents[4]
    assert grown.tokens == (whole.segment_ids > 0).sum()
    used = want.num_chunks
    assert used < bank.num_chunks
    np.testing.assert_array_equal(bank.layout.lengths[:7], want.layout.lengths)
    np.testing.assert_array_equal(bank.layout.starts[:7], want.layout.starts)
    owners = np.asarray(bank.layout.chunk_documents)
    np.testing.assert_array_equal(owners[:used], want.layout.chunk_documents)
    assert (owners[used:] == bank.num_documents).all()
    for name, array in want.arrays.items():
        if array is not None:
            axis = 2 if name in ("content_k_scale", "content_v_scale") else 1
            got = np.take(np.asarray(getattr(bank, name)), np.arange(used), axis=axis)
            np.testing.assert_allclose(got, array, atol=1 if array.dtype == np.int8 else 1e-5)
    assert (bank.key_scale is not None) == int8


def test_memories_of_like_sizes_have_one_shape(made):
    model, renderer, documents, numbers = made
    shapes = set()
    for some in (documents, documents[:4]):
        grown = GrowingBank(model, renderer, 32)
        grown.add(some, numbers[: len(some)])
        bank = grown.bank(30_000)
        shapes.add((bank.num_documents, bank.num_chunks, bank.layout.max_length))
    assert len(shapes) == 1
    assert bank.num_chunks * 8 >= 30_000, "room for all that a memory of this size can have"


def answer(text, named, best, outcome="answered"):
    event = lambda number: types.SimpleNamespace(kind="read", number=number)  # noqa: E731
    rounds = [types.SimpleNamespace(events=[event(n) for n in named], documents=np.array(best))]
    return types.SimpleNamespace(text=text, rounds=rounds, outcome=outcome)


def test_scores_of_an_answer():
    question = Question("q", "?", ("12, 34",), ("5", "8"), wanted=("12", "34"))
    right = ruler.score(question, answer("34, 12", [8, 5], [[5, 8, 1], [8, 1, 5]]))
    assert right["string_match"] == right["all_values"] == right["ids_exact"] == right["ids_recall"] == 1
    assert right["router_recall@n"] == [1.0, 0.5] and right["router_recall@16"] == [1.0, 1.0]
    half = ruler.score(question, answer("the 12", [5, 9], [[5, 8], [1, 2]], "cut"))
    assert (half["string_match"], half["all_values"], half["ids_exact"], half["ids_recall"]) == (0.5, 0, 0, 0.5)
    assert half["answered"] == 0
    mean = ruler.means([right, half])
    assert mean["string_match"] == 0.75 and mean["router_recall@n"] == [1.0, 0.25]


def test_tables_have_the_mean_and_what_is_kept_of_it(tmp_path):
    scores = {"niah_single_1": (1.0, 0.9, 0.8), "niah_multivalue": (0.5, 0.3, None)}
    sizes = (2**15, 2**17, 10**7)
    rows = [
        {"task": task, "memory_tokens": size, "string_match": value}
        for task, values in scores.items()
        for size, value in zip(sizes, values, strict=True)
        if value is not None
    ]
    lines = ruler_report.table(rows).splitlines()
    assert lines[0] == "| task | 32K | 128K | 10M |"
    assert lines[2] == "| `niah_single_1` | 1.000 | 0.900 | 0.800 |"
    assert lines[3] == "| `niah_multivalue` | 0.500 | 0.300 |  |"
    assert lines[4] == "| mean | 0.750 | 0.600 |  |"
    assert lines[5] == "| kept of 32K | 1.000 | 0.800 |  |"
    assert len(lines) == 6 and set(scores) < set(TASKS)
    ruler_report.plot(rows, tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").stat().st_size > 1000
