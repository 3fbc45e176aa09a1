"""`chunk_scores` against the per-head definition of routing, its gradients, its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax import routing
from pallas_kernels import chunk_scores
from pallas_kernels.chunk_scores import reference
from pallas_kernels.chunk_scores.api import NO_SCORE

B, T, C, M = 2, 5, 11, 12
HEADS = [(6, 3, 4), (4, 1, 12), (3, 3, 4)]  # H, K, D with K * D = M, so that one shape is compiled
seeds = st.integers(0, 2**31)
masks = st.lists(st.booleans(), min_size=B * T, max_size=B * T).map(lambda m: np.array(m).reshape(B, T))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def per_head(query, keys, mask):
    """`max over t of mean over h of cos(query[t, h], keys[c, h / G])` in float64, one head at a time."""
    scores = np.full((query.shape[0], len(keys)), NO_SCORE)
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    group = query.shape[2] // keys.shape[1]
    for b, t in zip(*np.nonzero(mask), strict=True):
        for c in range(len(keys)):
            heads = enumerate(query[b, t].astype(np.float64))
            mean = np.mean([unit(q) @ unit(keys[c, h // group]) for h, q in heads])
            scores[b, c] = max(scores[b, c], mean)
    return scores


def naive(query, keys, mask):
    products = jnp.einsum("btm,cm->btc", query, keys)
    return jnp.max(jnp.where(mask[:, :, None], products, NO_SCORE), axis=1)


@pytest.mark.parametrize("heads", HEADS)
@settings(max_examples=10)
@given(seed=seeds, mask=masks)
def test_equals_the_per_head_definition(heads, seed, mask):
    h, k, d = heads
    query, keys = normal(seed, B, T, h, d), normal(seed + 1, C, k, d)
    folded = routing.routing_query(jnp.asarray(query), num_kv_heads=k, score="cosine")
    stored = routing.routing_key(jnp.asarray(keys), score="cosine")
    got = chunk_scores(folded, stored, query_mask=jnp.asarray(mask))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, per_head(query, keys, mask), atol=1e-6)


def test_without_a_mask_every_token_routes():
    query, keys = jnp.asarray(normal(0, B, T, M)), jnp.asarray(normal(1, C, M))
    want = chunk_scores(query, keys, query_mask=jnp.ones((B, T), bool))
    np.testing.assert_array_equal(chunk_scores(query, keys), want)


@settings(max_examples=20)
@given(seed=seeds, mask=masks)
def test_gradients_equal_those_of_the_naive_form(seed, mask):
    query, keys = jnp.asarray(normal(seed, B, T, M)), jnp.asarray(normal(seed + 1, C, M))
    cotangent, mask = jnp.asarray(normal(seed + 2, B, C)), jnp.asarray(mask)
    want, want_vjp = jax.vjp(lambda q, k: naive(q, k, mask), query, keys)
    got, got_vjp = jax.vjp(lambda q, k: chunk_scores(q, k, query_mask=mask), query, keys)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for mine, theirs in zip(got_vjp(cotangent), want_vjp(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_gradient_reaches_the_winning_token_alone_and_the_first_of_equals():
    query = jnp.asarray(normal(0, 1, 4, M)).at[0, 3].set(normal(0, 1, 4, M)[0, 1])
    keys = jnp.stack([query[0, 1], -2 * query[0, 2], query[0, 1] - query[0, 2]])
    winners = np.argmax(np.asarray(query[0] @ keys.T), axis=0)
    assert 1 in winners and 3 not in winners  # tokens 1 and 3 are equal
    grad = jax.grad(lambda q, c: chunk_scores(q, keys)[0, c])
    for c, winner in enumerate(winners):
        want = np.zeros((4, M), np.float32)
        want[winner] = keys[c]
        np.testing.assert_allclose(grad(query, c)[0], want, rtol=1e-6)


@pytest.mark.parametrize("chunks", [256, 512, 600])
def test_tiles_leave_no_trace(chunks, monkeypatch):
    query, keys = jnp.asarray(normal(3, B, T, M)), jnp.asarray(normal(4, chunks, M))
    mask, cotangent = jnp.asarray(normal(5, B, T) > -0.5), jnp.asarray(normal(6, B, chunks))
    monkeypatch.setattr(reference, "_TILE_ELEMENTS", 1)
    jax.clear_caches()  # what was compiled with other tiles
    assert reference.tile_size(B, T, chunks, M) == min(256, chunks)
    got, vjp = jax.vjp(lambda q, k: chunk_scores(q, k, query_mask=mask), query, keys)
    want, want_vjp = jax.vjp(lambda q, k: naive(q, k, mask), query, keys)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for mine, theirs in zip(vjp(cotangent), want_vjp(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_never_holds_all_products():
    tokens, chunks = 32, 1 << 22
    shapes = (
        jax.ShapeDtypeStruct((B, tokens, M), jnp.float32),
        jax.ShapeDtypeStruct((chunks, M), jnp.bfloat16),
        jax.ShapeDtypeStruct((B, chunks), jnp.float32),
    )

    def backward(query, keys, cotangent):
        scores, vjp = jax.vjp(chunk_scores, query, keys)
        return scores, vjp(cotangent)

    products = 4 * B * tokens * chunks
    forward = jax.jit(chunk_scores).lower(*shapes[:2]).compile().memory_analysis()
    assert forward.temp_size_in_bytes < products / 4
    # The gradient of the keys is summed in float32, hence the room for it.
    both = jax.jit(backward).lower(*shapes).compile().memory_analysis()
    assert both.temp_size_in_bytes < products / 4 + 2 * 4 * chunks * M


@settings(max_examples=10)
@given(seed=seeds, mask=masks)
def test_bfloat16_keys_are_summed_in_float32(seed, mask):
    query, keys = jnp.asarray(normal(seed, B, T, M)), jnp.asarray(normal(seed + 1, C, M), jnp.bfloat16)
    got = chunk_scores(query, keys, query_mask=jnp.asarray(mask))
    np.testing.assert_allclose(got, naive(query, keys.astype(jnp.float32), jnp.asarray(mask)), atol=1e-5)
    rounded = query.astype(jnp.bfloat16)
    got = chunk_scores(rounded, keys, query_mask=jnp.asarray(mask))
    assert got.dtype == jnp.float32
    want = naive(rounded.astype(jnp.float32), keys.astype(jnp.float32), jnp.asarray(mask))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradients_keep_the_dtype_of_bfloat16_inputs():
    query, keys = jnp.asarray(normal(0, B, T, M), jnp.bfloat16), jnp.asarray(normal(1, C, M), jnp.bfloat16)
    grads = jax.grad(lambda q, k: chunk_scores(q, k).sum(), argnums=(0, 1))(query, keys)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]


@settings(max_examples=10)
@given(seed=seeds, mask=masks)
def test_int8_keys_with_a_scale(seed, mask):
    rng = np.random.default_rng(seed)
    query, mask = jnp.asarray(normal(seed, B, T, M)), jnp.asarray(mask)
    keys = jnp.asarray(rng.integers(-127, 128, (C, M)), jnp.int8)
    scale = jnp.asarray(rng.uniform(1e-3, 2e-2, C), jnp.float32)
    cotangent = jnp.asarray(normal(seed + 2, B, C))
    floats = keys.astype(jnp.float32) * scale[:, None]
    want, want_vjp = jax.vjp(lambda q: naive(q, floats, mask), query)
    got, vjp = jax.vjp(lambda q: chunk_scores(q, keys, query_mask=mask, key_scale=scale), query)
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(vjp(cotangent)[0], want_vjp(cotangent)[0], atol=2e-5)


def test_a_question_without_routing_tokens_scores_nothing_and_passes_no_gradient():
    mask = jnp.ones((B, T), bool).at[1].set(False)
    query, keys = jnp.asarray(normal(0, B, T, M)), jnp.asarray(normal(1, C, M))
    for scale in (None, jnp.full((C,), 1e-4)):
        scores = chunk_scores(query, keys, query_mask=mask, key_scale=scale)
        assert (scores[1] == NO_SCORE).all() and (scores[0] > NO_SCORE / 2).all()
    grads = jax.grad(lambda q, k: chunk_scores(q, k, query_mask=mask)[1].sum(), argnums=(0, 1))(query, keys)
    assert not any(np.any(g) for g in grads)


def test_an_empty_bank():
    query, keys = jnp.asarray(normal(0, B, T, M)), jnp.zeros((0, M))
    scores, vjp = jax.vjp(chunk_scores, query, keys)
    assert scores.shape == (B, 0)
    grads = vjp(scores)
    assert grads[0].shape == query.shape and not np.any(grads[0]) and grads[1].shape == keys.shape
