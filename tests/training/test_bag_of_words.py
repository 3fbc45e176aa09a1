"""The start as a bag of words: what a token weighs, what the question's last token holds, and what is found by it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.config import ConfigError
from msa_jax.data import Renderer, Template, Tokenizer, pack_documents
from msa_jax.run import make_model
from msa_jax.run_config import RunConfig
from msa_jax.training import bag_of_words
from msa_jax.training.init import embedding_stream, tie_router

CONFIG = MSAConfig.preset(
    "tiny", vocab_size=512, hidden_size=128, num_layers=4, router_layers=(2, 3), num_heads=4, num_kv_heads=2,
    head_dim=32, mlp_size=64, chunk_size=8, top_k=2,
)  # fmt: skip
LAST = 7
WEIGHTS = np.linspace(0.0, 1.0, CONFIG.vocab_size, dtype=np.float32)
COMMON, RARE = np.arange(20, 60), np.arange(200, 512)


def made(start: str, config=CONFIG) -> MSATransformer:
    model = MSATransformer(config, rngs=nnx.Rngs(0))
    embedding_stream(model, embedding_std=0.5, logit_scale=0.1)
    if start == "tied":
        tie_router(model)
    else:
        bag_of_words.bag_of_words(model, WEIGHTS, LAST, embedding_std=0.5, rngs=nnx.Rngs(1))
    return model


def scores(model, documents, questions) -> np.ndarray:
    """[L_r, B, N] of a bank of documents."""
    packed = pack_documents(list(documents), chunk_size=8, row_len=24, pad_id=0)
    encoded = model.encode_documents(packed.tokens, segment_ids=packed.segment_ids, positions=packed.positions)
    bank = model.bank(encoded.states, packed.layout)
    positions = jnp.broadcast_to(jnp.arange(questions.shape[1]) + 16, questions.shape)
    return np.asarray(model(questions, positions=positions, bank=bank).document_scores)


def task(num: int, rng):
    """Documents of 16 common and 8 rare tokens; each question has 3 rare ones of its document, and many others'."""
    documents = [rng.permutation(np.r_[rng.choice(COMMON, 16), rng.choice(RARE, 8, replace=False)]) for _ in range(num)]
    questions = []
    for document in documents:
        # Out of one chunk: what one vector can hold together.
        own = [t for t in document[8:16] if t in RARE][:3]
        others = rng.choice(COMMON, 11 - len(own))
        questions.append([*rng.permutation(np.r_[own, others]), LAST])
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
    packed = pack_documents(documents, chunk_size=8, row_len=24, pad_id=0)
    encoded = model.encode_documents(packed.tokens, segment_ids=packed.segment_ids, positions=packed.positions)
    bank = model.bank(encoded.states, packed.layout)
    positions = jnp.broadcast_to(jnp.arange(12) + 16, questions.shape)
    queries = np.asarray(model(questions, positions=positions, bank=bank, return_queries=True).queries)
    # By the definition: embeddings after the norm, those of the words added up, and projected as a key is.
    table = np.asarray(model.embed.embedding[...], np.float64)
    normed = table / np.sqrt(np.mean(table**2, axis=1, keepdims=True) + CONFIG.norm_eps)
    words = normed[questions[:, :-1]].sum(1)
    words[:, 0] = 0
    for layer, kernel in enumerate(np.asarray(model.groups[1].attention.router_k_proj.kernel[...], np.float64)):
        heads = (words @ kernel).reshape(30, 2, 32)
        want = (heads / np.linalg.norm(heads, axis=-1, keepdims=True)).reshape(30, 64)
        last = queries[layer, :, -1]
        cosine = np.sum(want * last, -1) / np.linalg.norm(want, axis=-1) / np.linalg.norm(last, axis=-1)
        # The layer below adds words up as its values see them, an orthogonal map and back, and not quite evenly.
        assert cosine.min() > 0.8 and np.median(cosine) > 0.9, (cosine.min(), np.median(cosine))
        keys = np.asarray(bank.routing_keys[layer]).reshape(-1, 2, 32)
        np.testing.assert_array_equal(keys[:, :, -1], 0.0)  # no key uses what single words ask for
        aside = queries[layer].reshape(30, 12, 2, 32)[..., -1]
        assert aside[:, :-1].min() > 3 * np.abs(aside[:, -1]).max() > 0


def test_documents_stay_their_own_words():
    """What the layer below adds to a document's token is small beside its embedding."""
    model = made("bag")
    tokens = jnp.asarray(np.random.default_rng(2).choice(RARE, (1, 24)), jnp.int32)
    hidden = model.encode_documents(
        tokens, segment_ids=jnp.ones_like(tokens), positions=jnp.arange(24)[None], return_hidden=True
    ).hidden
    first, second = np.asarray(hidden[0]), np.asarray(hidden[2])
    change = np.linalg.norm(second - first, axis=-1) / np.linalg.norm(first, axis=-1)
    assert 0 < change.min() and change.max() < 0.5 and np.median(change) < 0.25


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


def test_frequent_words_weigh_less_and_frames_nothing(tokenizer):
    weights = bag_of_words.rarity(tokenizer, 450)
    assert weights.shape == (450,) and weights.dtype == np.float32 and weights.max() == 1.0
    special = [tokenizer.token_id(token) for token in tokenizer.template.special_tokens]
    assert not weights[special].any()
    bytes_ = [tokenizer.token_id(c) for c in "abz09"]
    assert (weights[bytes_] == weights[bytes_][0]).all() and 0 < weights[bytes_][0] < 0.1
    words = np.arange(max(*special, 256 + len(special)) + 40, tokenizer.vocab_size)
    assert len(words) > 10 and (np.diff(weights[words]) > 0).all()


@pytest.mark.parametrize("template", [Template.compact(id_digits=3), Template.paper(id_digits=3)])
def test_the_last_token_ends_every_question(template):
    own = Tokenizer.train(["some text\nof words"] * 3, 400, template)
    last = bag_of_words.last_routing_token(own)
    for question in ("Who?", "a longer question about words", ""):
        ids, _ = Renderer(own).prompt(question)
        head = Renderer(own)._reply_head
        assert ids[-len(head) - 1] == last


def settings(**training):
    return {
        "model": {
            "hidden_size": 64, "num_layers": 2, "num_heads": 1, "num_kv_heads": 1, "head_dim": 64, "router_layers": (1,),
        },
        "training": {"phases": [{"steps": 1}], "embedding_std": 0.5, "bag_of_words": True, **training},
    }  # fmt: skip


def test_a_run_starts_so(tokenizer):
    run = RunConfig.from_dict(settings())
    table = np.asarray(make_model(run, tokenizer).embed.embedding[...], np.float32)
    last = bag_of_words.last_routing_token(tokenizer)
    assert np.ptp(np.delete(table[:, 0], last)) == 0 < table[last, 0] < table[last - 1, 0] / 10
    rare, common = np.linalg.norm(table[[-1, -80], 1:], axis=1)
    assert rare > 1.3 * common
    np.testing.assert_array_equal(
        np.asarray(jax.tree.leaves(nnx.state(make_model(run, tokenizer)))[0]),
        np.asarray(jax.tree.leaves(nnx.state(make_model(run, tokenizer)))[0]),
    )


@pytest.mark.parametrize("changes", [{"embedding_std": 0.0}, {"tied_router": True}])
def test_what_it_needs_is_said(changes):
    with pytest.raises(ConfigError, match="bag_of_words ties the router itself"):
        RunConfig.from_dict(settings(**changes))


def test_a_router_in_layer_0_has_nothing_below_it(tokenizer):
    values = settings()
    values["model"]["router_layers"] = (0, 1)
    with pytest.raises(ConfigError, match=r"router_layers \(0, 1\) begin with layer 0"):
        make_model(RunConfig.from_dict(values), tokenizer)
