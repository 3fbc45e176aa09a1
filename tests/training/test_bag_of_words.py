"""The start as a bag of words: what a token weighs, what the question's last token holds, and what is found by it."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.bank import encode_bank
from msa_jax.context import Route
from msa_jax.data import Renderer, Template, Tokenizer, pack_documents
from msa_jax.data.batch import ROUTING
from msa_jax.errors import ConfigError
from msa_jax.runs.build import make_model
from msa_jax.runs.config import RunConfig
from msa_jax.training import bag_of_words
from msa_jax.training.init import embedding_stream, tie_router

CONFIG = MSAConfig.preset(
    "tiny", vocab_size=512, hidden_size=128, num_layers=4, router_layers=(2, 3), num_heads=4, num_kv_heads=2,
    head_dim=32, mlp_size=64, chunk_size=8, top_k_documents=2,
)  # fmt: skip
FRAME, END = 5, 7
WEIGHTS = np.linspace(0.0, 1.0, CONFIG.vocab_size, dtype=np.float32)
WEIGHTS[:7] = 0.0
COMMON, RARE = np.arange(20, 60), np.arange(200, 512)


@functools.cache
def made(start: str, config=CONFIG) -> MSATransformer:
    model = MSATransformer(config, rngs=nnx.Rngs(0))
    embedding_stream(model, embedding_std=0.5, logit_scale=0.1)
    if start == "tied":
        tie_router(model)
    else:
        bag_of_words.bag_of_words(model, WEIGHTS, END, embedding_std=0.5, rngs=nnx.Rngs(1))
    return model


def bank_of(model, documents):
    return encode_bank(model, pack_documents(list(documents), chunk_size=8, row_len=32, pad_id=0))


def asked(model, documents, questions):
    """Output for questions that stand behind a prefix of one frame token."""
    template = model.encode_template(jnp.full((1, 1), FRAME))
    read = Route(bank_of(model, documents), want=("scores", "queries"))
    return model.prefill(questions, template=template, read=read)


def scores(model, documents, questions) -> np.ndarray:
    """[L_r, B, N]"""
    return np.asarray(asked(model, documents, questions).document_scores)


def task(num: int, rng):
    """Documents of 16 common and 8 rare tokens; each question has 3 rare ones of its document, and many others'."""
    words = [np.r_[rng.choice(COMMON, 15), rng.choice(RARE, 8, replace=False)] for _ in range(num)]
    documents = [[FRAME, *rng.permutation(some)] for some in words]
    questions = []
    for document in documents:
        # Out of one chunk: what one vector can hold together.
        own = [t for t in document[8:16] if t in RARE][:3]
        others = rng.choice(COMMON, 11 - len(own))
        questions.append([*rng.permutation(np.r_[own, others]), END])
    return documents, np.asarray(questions, np.int32), np.asarray([sum(t in RARE for t in q) for q in questions])


def test_a_question_finds_the_document_with_its_rare_words():
    documents, questions, rare = task(200, np.random.default_rng(0))
    right = {}
    for start in ("tied", "bag"):
        best = scores(made(start), documents, questions).argmax(-1)
        right[start] = np.mean(best[:, rare >= 3] == np.arange(200)[rare >= 3], axis=1)
    assert right["bag"].min() > 0.9
    assert right["tied"].max() < right["bag"].min() - 0.3


def test_the_last_token_asks_for_the_sum_of_all_words_and_no_other_token_scores_as_high():
    model = made("bag")
    documents, questions, _ = task(30, np.random.default_rng(1))
    queries = np.asarray(asked(model, documents, questions).queries)
    # By the definition: embeddings after the norm, those of the words added up, as layer 0's values and output
    # projections pass them on, and projected as a key is.
    table = np.asarray(model.embed.embedding[...], np.float64)
    normed = table / np.sqrt(np.mean(table**2, axis=1, keepdims=True) + CONFIG.norm_eps)
    words = normed[questions[:, :-1]].sum(1)
    lowest = model.groups[0].attention
    value, output = (np.asarray(p.kernel[...], np.float64)[0] for p in (lowest.v_proj, lowest.o_proj))
    words = np.repeat((words @ value).reshape(30, 2, 32), 2, axis=1).reshape(30, 128) @ output
    for layer, kernel in enumerate(np.asarray(model.groups[1].attention.router_k_proj.kernel[...], np.float64)):
        heads = (words @ kernel).reshape(30, 2, 32)
        want = (heads / np.linalg.norm(heads, axis=-1, keepdims=True)).reshape(30, 64)
        last = queries[layer, :, -1]
        cosine = np.sum(want * last, -1) / np.linalg.norm(want, axis=-1) / np.linalg.norm(last, axis=-1)
        assert cosine.min() > 0.97, cosine
        keys = np.asarray(bank_of(model, documents).routing_keys[layer]).reshape(-1, 2, 32)[..., -1]
        aside = queries[layer].reshape(30, 12, 2, 32)[..., -1]
        assert -0.2 < keys.min() and keys.max() == 0.0  # no word of a key is where single words of questions are
        assert not aside[:, -1].any() and aside[:, :-1].min() > 0.05


def test_documents_and_single_words_stay_what_they_are():
    """Layer 0 adds next to nothing to a document's tokens, nor to a question's but the last."""
    model = made("bag")
    tokens = jnp.asarray([[FRAME, *np.random.default_rng(2).choice(np.r_[COMMON, RARE], 22), END]], jnp.int32)
    positions = jnp.arange(24)[None]
    hidden = model.encode_documents(
        tokens, segment_ids=jnp.ones_like(tokens), positions=positions, return_hidden=True
    ).hidden
    active = model.prefill(tokens, positions=positions, return_hidden=True).all_hidden
    for states in (hidden, active):
        change = np.linalg.norm(np.asarray(states[1] - states[0])[0], axis=-1)
        assert change[:-1].max() < 0.01 * np.linalg.norm(np.asarray(states[0])[0], axis=-1).min()
        assert change[-1] > 1.0


def test_the_end_of_a_question_weighs_words_alike_however_far():
    """It holds their mean: the order of words does not matter, nor what stands in the frame."""
    model, rng = made("bag"), np.random.default_rng(4)
    words = rng.choice(RARE, 20, replace=False)
    tokens = jnp.asarray([[FRAME, *words, END], [FRAME, *rng.permutation(words), END], [*words, FRAME, END]], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(22), tokens.shape)
    end = np.asarray(model.prefill(tokens, positions=positions, return_hidden=True).all_hidden[1])[:, -1, 3:]
    assert np.abs(end).max() > 0.5
    np.testing.assert_allclose(end, end[:1].repeat(3, 0), rtol=0, atol=0.02 * np.abs(end).max())


def test_a_chunk_of_special_tokens_alone_has_a_key_and_scores_nothing():
    model = made("bag")
    documents, questions, _ = task(5, np.random.default_rng(5))
    keys = bank_of(model, [[FRAME] * 8, *documents]).routing_keys[:, 0]
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 2**0.5, rtol=1e-5)
    own = scores(model, [[FRAME] * 8, *documents], questions)
    assert own[:, :, 0].max() <= 0 < own[:, np.arange(5), 1 + np.arange(5)].min()


@pytest.mark.slow
def test_starts_with_as_many_query_heads_as_key_heads_and_with_wide_heads():
    for heads, width in ((2, 32), (4, 64)):
        model = made("bag", dataclasses.replace(CONFIG, num_heads=heads, head_dim=width))
        documents, questions, rare = task(60, np.random.default_rng(3))
        best = scores(model, documents, questions).argmax(-1)
        assert np.mean(best[:, rare >= 3] == np.arange(60)[rare >= 3]) > 0.8


@pytest.fixture(scope="module")
def tokenizer():
    words = [a + b for a in ("ba", "co", "di", "fu", "ga") for b in ("ge", "li", "mo", "nu", "pa")]
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, 26)
    texts = [" ".join(rng.choice(words, 40, p=shares / shares.sum())) for _ in range(50)]
    return Tokenizer.train(texts, 420, Template.compact(id_digits=3))


def test_words_weigh_as_their_inverse_document_frequency_and_frames_nothing(tokenizer, monkeypatch):
    texts = ["bage dimo dimo", "bage fupa", "bage dimo", "bage", "bage gali bage"]
    weights = bag_of_words.rarity(tokenizer, texts, 450)
    assert weights.shape == (450,) and weights.dtype == np.float32
    special = [tokenizer.token_id(token) for token in tokenizer.template.special_tokens]
    assert not weights[special].any() and np.delete(weights, special).min() == np.float32(0.01)

    (first,) = tokenizer.encode("bage")
    unseen = tokenizer.token_id("z")
    assert weights[first] == np.float32(0.01) and weights[unseen] == 1.0  # in all five texts, and in none
    for word, held in (("dimo", 2), ("fupa", 1), ("gali", 1)):
        (token,) = tokenizer.encode(f" {word}")
        np.testing.assert_allclose(weights[token], np.log(6 / (held + 1)) / np.log(6), rtol=1e-6)
    monkeypatch.setattr(bag_of_words, "_TEXTS_AT_ONCE", 2)  # and none is lost where batches meet
    np.testing.assert_array_equal(bag_of_words.rarity(tokenizer, iter(texts), 450), weights)


@pytest.mark.parametrize("template", [Template.compact(id_digits=3), Template.paper(id_digits=3)])
def test_the_last_token_ends_every_question(template):
    own = Tokenizer.train(["some text\nof words"] * 3, 400, template)
    last = bag_of_words.last_routing_token(own)
    for question in ("Who?", "a longer question about words", ""):
        ids, roles = Renderer(own).prompt(question)
        assert ids[len(roles) - 1 - roles[::-1].index(ROUTING)] == last


def settings(**training):
    return {
        "model": {
            "hidden_size": 64, "num_layers": 2, "num_heads": 1, "num_kv_heads": 1, "head_dim": 64,
            "router_layers": (1,),
        },
        "data": {"source": "python_docs", "max_chars": 1_000_000},
        "training": {"phases": [{"steps": 1}], "embedding_std": 0.5, "bag_of_words": True, **training},
    }  # fmt: skip


def test_a_run_starts_so(tokenizer):
    table = np.asarray(make_model(RunConfig.from_dict(settings()), tokenizer).embed.embedding[...], np.float32)
    end = bag_of_words.last_routing_token(tokenizer)
    special = [tokenizer.token_id(token) for token in tokenizer.template.special_tokens]
    for column, tokens in ((0, tokenizer.encode("bage libra")), (1, special), (2, [end])):
        want = np.zeros((len(tokens), 3))
        want[:, column] = 0.5 * 64**0.5
        np.testing.assert_allclose(table[tokens, :3], want)
    assert not table[special + [end], 3:].any()
    rare, common = np.linalg.norm(table[[tokenizer.vocab_size - 1, 256 + len(special) + 2], 3:], axis=1)
    assert rare > 3 * common


@pytest.mark.parametrize("changes", [{"embedding_std": 0.0}, {"tied_router": True}])
def test_what_it_needs_is_said(changes):
    with pytest.raises(ConfigError, match="bag_of_words ties the router itself"):
        RunConfig.from_dict(settings(**changes))


@pytest.mark.parametrize("source", ["needles", "ruler", "babi"])
def test_documents_that_are_made_up_have_no_words_to_count(source):
    values = settings()
    values["data"] = {"source": source, "folder": "somewhere"}
    with pytest.raises(ConfigError, match=f"data.source '{source}' makes its documents up; take jsonl"):
        RunConfig.from_dict(values)


def test_a_router_in_layer_0_has_nothing_below_it():
    values = settings()
    values["model"]["router_layers"] = (0, 1)
    with pytest.raises(ConfigError, match=r"router_layers \(0, 1\) begin with layer 0"):
        RunConfig.from_dict(values)
