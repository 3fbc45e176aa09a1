"""Explaining a question: scores, ranks and passages against those computed plainly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from msa_jax import MSAConfig, MSATransformer
from msa_jax.bank import encode_bank
from msa_jax.bank.quantization import quantize
from msa_jax.bank.spread import spread
from msa_jax.context import Route
from msa_jax.data import Document, Renderer, Template, Tokenizer, pack_documents
from msa_jax.data.batch import REPLY, ROUTING, TEMPLATE
from msa_jax.inference import AskConfig, Session
from msa_jax.inference.explain import best_chunk, explain_question
from msa_jax.inference.explanation import text_of_token, texts_of_chunks
from msa_jax.inference.settings import MODES
from msa_jax.sharding import MeshConfig, Shardings

P, ROW = 4, 40
TEXTS = [
    "the river runs north past seven towns and a mill, then slowly into the grey lake",
    "the stone is grey",
    "東京 lies east; the cloud is high above the bridge",
    "a cloud",
    "seven bridges cross the river at the mill",
]
NUMBERS = [4, 7, 9, 12, 30]
DOCUMENTS = [Document(f"d{n}", f"Title {n}", text) for n, text in zip(NUMBERS, TEXTS, strict=True)]
QUESTION = "where does the river run past 東京"


@functools.cache
def renderer():
    return Renderer(Tokenizer.train([*TEXTS, QUESTION] * 3, 420, Template.compact(id_digits=2)))


@functools.cache
def model_of():
    config = MSAConfig(
        vocab_size=renderer().tokenizer.vocab_size, hidden_size=16, num_layers=4, num_heads=4, num_kv_heads=2,
        head_dim=6, mlp_size=20, chunk_size=P, top_k_documents=2, position_offset=5, router_layers=(1, 3),
    )  # fmt: skip
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    draw = lambda path, x: jnp.asarray(("scale" in jax.tree_util.keystr(path)) + rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


@functools.cache
def bank_of(kind="float32"):
    rendered = [renderer().render_document(d, n) for d, n in zip(DOCUMENTS, NUMBERS, strict=True)]
    bank = encode_bank(model_of(), pack_documents(rendered, chunk_size=P, row_len=ROW), rows_per_step=2)
    if kind == "bfloat16":
        return bank.replace(routing_keys=bank.routing_keys.astype(jnp.bfloat16))
    return quantize(bank) if kind == "int8" else bank


best_chunk_jit = jax.jit(best_chunk)


def asked(question=QUESTION):
    tokens, roles = renderer().prompt(question)
    return tokens, roles


@functools.partial(jax.jit, static_argnames=("graphdef", "want"))
def _forward(graphdef, params, prefix, tokens, route, bank, visible, want=("scores", "queries")):
    model = nnx.merge(graphdef, params)
    read = Route(bank, route, visible, want=want)
    return model.prefill(tokens, template=model.encode_template(prefix), read=read)


def forward(bank, visible=None, question=QUESTION, **kwargs):
    """The question alone and unpadded."""
    tokens, roles = asked(question)
    route = jnp.asarray([roles]) == ROUTING
    prefix = jnp.asarray([renderer().prefix])
    visible = None if visible is None else visible[None]
    return _forward(*nnx.split(model_of()), prefix, jnp.asarray([tokens]), route, bank, visible, **kwargs)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_documents_are_those_that_the_router_finds_and_chunks_those_that_it_scores(kind):
    model, bank = model_of(), bank_of(kind)
    tokens, roles = asked()
    found = explain_question(model, renderer().prefix, tokens, roles, bank)
    output = forward(bank)
    scores, queries = (np.asarray(x)[:, 0] for x in (output.document_scores, output.queries))
    keys, scales, starts, lengths = map(
        np.asarray, (bank.routing_keys, bank.key_scale, bank.layout.starts, bank.layout.lengths)
    )
    route = np.asarray(roles) == ROUTING
    mean = scores.mean(axis=0)
    tolerance = 2e-2 if kind == "bfloat16" else 1e-5  # padding rounds otherwise
    assert [f.index for f in found] == np.argsort(-mean).tolist()
    for one in found:
        np.testing.assert_allclose(one.scores, scores[:, one.index], atol=tolerance)
        np.testing.assert_array_equal(one.ranks, 1 + (scores > scores[:, [one.index]]).sum(axis=1))
        start, length = int(starts[one.index]), int(lengths[one.index])
        valid = (np.arange(keys.shape[1]) >= start) & (np.arange(keys.shape[1]) < start + length)
        for layer in range(2):
            scale = scales[layer] if kind == "int8" else None
            chunk, token, score = best_chunk_jit(queries[layer], keys[layer], route=route, valid=valid, key_scale=scale)
            np.testing.assert_allclose(score, scores[layer, one.index], atol=1e-6, rtol=0)
            assert (one.chunks[layer], one.tokens[layer]) == (chunk - start, token)
            assert roles[token] == ROUTING and start <= chunk < start + length


@given(seed=st.integers(0, 2**31), masked=st.booleans())
def test_the_best_chunk_is_the_largest_product(seed, masked):
    rng, (t, n, m) = np.random.default_rng(seed), (5, 7, 3)
    queries, scale = rng.integers(-4, 5, (t, m)).astype(np.float32), rng.integers(1, 4, n).astype(np.float32)
    keys = rng.integers(-4, 5, (n, m)).astype(np.int8)
    route, valid = (rng.random(size) < (0.4 if masked else 1) for size in (t, n))
    route[rng.integers(t)] = valid[rng.integers(n)] = True
    chunk, token, score = best_chunk_jit(queries, keys, route=route, valid=valid, key_scale=scale)
    products = (keys.astype(np.float32) * scale[:, None]) @ queries.T
    assert route[token] and valid[chunk]
    assert score == products[chunk, token] == products[valid][:, route].max()


def test_only_visible_documents_are_explained_and_ranked():
    tokens, roles = asked()
    everything = explain_question(model_of(), renderer().prefix, tokens, roles, bank_of(), documents=50)
    assert len(everything) == len(TEXTS)
    hidden = everything[0].index
    visible = np.arange(len(TEXTS)) != hidden
    rest = explain_question(model_of(), renderer().prefix, tokens, roles, bank_of(), visible=visible, documents=50)
    assert hidden not in [f.index for f in rest] and len(rest) == len(TEXTS) - 1
    assert sorted(f.ranks[0] for f in rest) == [1, 2, 3, 4]
    nothing = explain_question(model_of(), renderer().prefix, tokens, roles, bank_of(), visible=visible & False)
    assert nothing == []


@pytest.mark.parametrize("question", ["mill", QUESTION * 3], ids=["short", "long"])
def test_any_length_of_question(question):
    tokens, roles = asked(question)
    found = explain_question(model_of(), renderer().prefix, tokens, roles, bank_of(), documents=5)
    scores = np.asarray(forward(bank_of(), question=question).document_scores[:, 0])
    for one in found:
        np.testing.assert_allclose(one.scores, scores[:, one.index], atol=1e-5)


def test_a_bank_that_is_spread_is_explained_the_same():
    tokens, roles = asked()
    alone = explain_question(model_of(), renderer().prefix, tokens, roles, bank_of())
    mesh = MeshConfig(memory=2).make()
    with jax.set_mesh(mesh):
        bank = spread(bank_of(), mesh, Shardings.inference())
        apart = explain_question(model_of(), renderer().prefix, tokens, roles, bank)
    assert len(apart) == len(TEXTS)
    for a, b in zip(alone, apart, strict=True):
        assert a.index == b.index
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
        for name in ("ranks", "chunks", "tokens"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("document, number", list(zip(DOCUMENTS, NUMBERS, strict=True)), ids=NUMBERS)
def test_passages_are_the_text_of_chunks(document, number):
    rendered, decode = renderer().render_document(document, number), renderer().tokenizer.decode
    first, size = renderer().text_start(number), len(renderer().body(document))
    told = []
    for chunk, text in enumerate(texts_of_chunks(renderer(), document, number, P)):
        if (chunk + 1) * P <= first or chunk * P >= first + size:
            assert text == decode(rendered[chunk * P : chunk * P + P])
        else:
            told.append(text)
    assert "".join(told).replace(" ", "") == document.text.replace(" ", "")


@pytest.mark.parametrize("before", ["", "x", "xx", "xxx"])
def test_characters_that_chunks_tear_are_left_out(before):
    bytewise = Renderer(Tokenizer.train(["a"], 340, Template.compact(id_digits=2)))
    document = Document("d", "", before + "ab東京cd")
    texts = texts_of_chunks(bytewise, document, 5, P)
    assert len(texts) == -(-len(bytewise.render_document(document, 5)) // P)
    told = [text for text in texts if "|>" not in text]
    assert [text for text in told if text not in document.text] == []
    assert {"a", "b", "c", "d"} <= set("".join(told))


def test_a_token_that_is_part_of_a_character_is_told_whole():
    bytewise = Renderer(Tokenizer.train(["a"], 340, Template.compact(id_digits=2)))
    tokens = bytewise.tokenizer.encode("a京b")
    assert [text_of_token(bytewise, tokens, i) for i in (0, 2, 4)] == ["a", "京", "b"]


@pytest.fixture(scope="module")
def session():
    documents = dict(zip(NUMBERS, DOCUMENTS, strict=True))
    with Session(model_of(), renderer().tokenizer, bank_of(), documents=documents) as session:
        yield session


def test_a_session_explains_with_titles_and_texts(session):
    tokens, roles = asked()
    found = explain_question(model_of(), renderer().prefix, tokens, roles, bank_of())
    told = session.explain(QUESTION)
    assert told.question == QUESTION
    assert [d.number for d in told.documents] == [NUMBERS[f.index] for f in found]
    for one, document in zip(found, told.documents, strict=True):
        source = DOCUMENTS[one.index]
        assert (document.id, document.title, document.text) == (source.id, source.title, source.text)
        assert document.score == pytest.approx(float(one.scores.mean()))
        texts = texts_of_chunks(renderer(), source, document.number, P)
        for i, match in enumerate(document.layers):
            at = (match.layer, match.rank, match.chunk, match.passage)
            assert at == ((1, 3)[i], one.ranks[i], one.chunks[i], texts[one.chunks[i]])
            assert match.score == pytest.approx(float(one.scores[i]))
            assert match.token == text_of_token(renderer(), tokens, one.tokens[i])


def test_what_is_not_in_memory_is_said_in_the_templates_words(session):
    for mode in MODES:
        events = list(session.stream(QUESTION, config=AskConfig(mode=mode, abstain_below=2.0)))
        answer = events[-1].answer
        assert (answer.outcome, answer.text) == ("not_in_memory", renderer().tokenizer.template.not_found)
        assert [e.text for e in events[:-1]] == [answer.text]
        assert (answer.completion_tokens, answer.citations) == (0, ())


def test_queries_are_returned_when_asked_for_only():
    assert forward(bank_of(), want=()).queries is None
    queries = forward(bank_of()).queries
    assert (queries.shape, queries.dtype) == ((2, 1, len(asked()[0]), 12), jnp.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(documents=0), "documents must be at least 1"),
        (dict(roles=[TEMPLATE, REPLY]), "no token that routes"),
    ],
)
def test_bad_requests_are_refused(change, message):
    asks = dict(tokens=[1, 2], roles=[ROUTING, REPLY]) | change
    with pytest.raises(ValueError, match=message):
        explain_question(model_of(), renderer().prefix, bank=bank_of(), **asks)
