"""Rankings of passages by a router: exact against the model's own training pass, joined with others, and scored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.data import CorpusSource, Document, Question, Renderer, Template, Tokenizer
from msa_jax.data.batch import Batch, pack_documents, pack_questions
from msa_jax.data.splits import draw_numbers
from msa_jax.errors import DataError
from msa_jax.evaluation.mine import mine
from msa_jax.evaluation.retrieval import (
    best_passages,
    encode_documents,
    fuse,
    part_of,
    router_scores,
)
from msa_jax.evaluation.scores import recall
from msa_jax.training.step import forward

TEXTS = [
    "the river runs north past seven towns and a mill",
    "the stone is grey and old",
    "a cloud is high over the river",
    "seven bridges cross the river at the mill and at the town that lies far north of it",
    "grey stone",
]
QUESTIONS = ["where does the river run", "what is grey", "which cloud", "how many bridges cross the river by the mill"]


@pytest.fixture(scope="module")
def renderer():
    return Renderer(Tokenizer.train([*TEXTS, *QUESTIONS] * 3, 340, Template.compact(id_digits=2)))


@pytest.fixture(scope="module")
def model(renderer):
    config = MSAConfig(
        vocab_size=renderer.tokenizer.vocab_size, hidden_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
        mlp_size=20, chunk_size=4, top_k_documents=2, position_offset=5, router_layers=(0, 1),
    )  # fmt: skip
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), state))


@pytest.fixture(scope="module")
def documents():
    return [Document(f"d{i}", "", text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("mean", [False, True])
def test_scores_are_those_of_the_training_pass(model, renderer, documents, mean):
    bank = encode_documents(model, renderer, documents, row_len=48, seed=5)
    got = dict(router_scores(model, renderer, bank, QUESTIONS, batch_size=3, mean_over_tokens=mean))
    numbers = draw_numbers(np.random.default_rng(5), len(documents), 2).tolist()
    packed = pack_documents(
        [renderer.render_document(d, n) for d, n in zip(documents, numbers, strict=True)], chunk_size=4, row_len=48
    )
    samples = [renderer.question(Question("", q, (), ())) for q in QUESTIONS]
    seen = np.ones((len(QUESTIONS), len(documents)), bool)
    batch = Batch(packed, pack_questions(samples, question_len=50, visible=seen, relevant=seen))
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda s, mean: forward(nnx.merge(graphdef, s), batch, tuple(renderer.prefix), mean_over_tokens=mean))
    expected = run(state, mean).document_scores
    assert sorted(got) == [0, 1, 2, 3] and np.std(np.asarray(expected)) > 1e-3
    np.testing.assert_allclose(np.stack([got[i] for i in range(4)], 1), expected, atol=2e-5)


def test_part_of_a_bank_is_the_bank_of_that_part(model, renderer, documents):
    bank = encode_documents(model, renderer, documents, row_len=48)
    part = part_of(bank, np.array([3, 0]))
    full = dict(router_scores(model, renderer, bank, QUESTIONS))
    some = dict(router_scores(model, renderer, part, QUESTIONS))
    assert part.layout.num_chunks == int(np.asarray(bank.layout.lengths)[[3, 0]].sum()) < bank.layout.num_chunks
    # The first router layer has read nothing yet, so its scores are those of the whole bank.
    for i in range(len(QUESTIONS)):
        np.testing.assert_allclose(some[i][0], full[i][0][[3, 0]], atol=1e-6)


def test_passages_score_as_their_best_block():
    scores = np.array([[0.1, 0.9, 0.5, 0.8, 0.2], [0.8, 0.0, 0.1, 0.2, 0.4]], np.float32)
    passages = np.array([7, 7, 3, 5, 5])
    first, second, mean = best_passages(scores, passages, 9)
    assert (first, second, mean) == ([7, 5, 3], [7, 5, 3], [5, 7, 3])
    assert best_passages(scores, passages, 2)[0] == [7, 5]
    assert best_passages(np.array([[0.0, 0.3, 0.1]]), np.array([1, 2, 1]), 3) == [[2, 1], [2, 1]]


def test_recall_counts_all_that_is_wanted():
    assert [recall([4, 9, 2], {2, 9}, k) for k in (1, 2, 3)] == [0, 0.5, 1]
    assert recall([4, 9], {2, 9}, 5) == recall([9, 4], {2, 9}, 1) == 0.5
    with pytest.raises(DataError, match="nothing wanted"):
        recall([1], set(), 1)


def test_fusion_by_reciprocal_ranks():
    assert fuse([[1, 2, 3], [3, 2, 4]]) == [3, 2, 1, 4]
    assert fuse([[5, 6], []]) == [5, 6]
    # Third in both outweighs first in one, unless the constant is small.
    assert fuse([[1, 8, 5], [7, 9, 5]])[0] == 5 and fuse([[1, 8, 5], [7, 9, 5]], constant=0)[0] == 1


def test_mined_negatives_are_the_best_of_the_wrong_ones(model, renderer):
    documents = [Document(f"p{i}/{j}", "", TEXTS[(i + j) % 5]) for i in range(4) for j in (1, 2)]
    documents += [Document("whole", "", TEXTS[1]), Document("a/b", "", TEXTS[2])]
    asked = [Question(f"q{i}", text, ("x",), (f"p{i % 4}/1",)) for i, text in enumerate(QUESTIONS)]
    asked.append(Question("pair", "grey stone", (), ("a/b",)))
    source = CorpusSource(documents, asked + asked)
    found = mine(model, renderer, source, row_len=48, most=5, count=3)
    assert set(found) == {"q0", "q1", "q2", "q3", "pair"}
    assert set(mine(model, renderer, source, row_len=48, most=4, count=3)) == {"q0", "q1", "q2", "q3"}, "answers first"
    bank = encode_documents(model, renderer, documents, row_len=48)
    names = [d.id for d in documents]
    for i, scores in router_scores(model, renderer, bank, [q.question for q in asked]):
        passage = {f"p{i}/1", f"p{i}/2"} if i < 4 else {"a/b"}
        wrong = [names[j] for j in np.argsort(-scores.mean(0), kind="stable") if names[j] not in passage]
        assert found[asked[i].id] == wrong[:3]
