"""Routing: document scores against a loop, selection, router bias, document layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax import routing
from msa_jax.memory import DocumentLayout
from msa_jax.memory.selection import Selection, bias_of
from msa_jax.routing import NO_SCORE

B, T, N, C, H, K, D = 2, 3, 5, 23, 6, 2, 4
M = K * D
seeds = st.integers(0, 2**31)


def bits(*shape):
    size = int(np.prod(shape))
    return st.lists(st.booleans(), min_size=size, max_size=size).map(lambda m: np.array(m).reshape(shape))


@st.composite
def owners(draw):
    """chunk_documents [C]: documents of 0 to 3 chunks in any order, unused ones (N) among and after them."""
    lengths = draw(st.lists(st.integers(0, 3), min_size=N, max_size=N))
    gaps = draw(st.lists(st.integers(0, 1), min_size=N, max_size=N))
    row = sum(([N] * gaps[d] + [d] * lengths[d] for d in draw(st.permutations(range(N)))), [])
    return np.array(row + [N] * (C - len(row)), np.int32)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="score")
def scores_of(query, keys, layout, route, visible, mean, *, score="cosine"):
    query = routing.routing_query(query, num_kv_heads=K, score=score)
    keys = routing.routing_key(keys, score=score)
    query = routing.averaged(query, route, mean)
    return routing.document_scores(query, keys, layout, route=route, visible=visible)


def layout_of(owners):
    """A layout whose static bound does not depend on what was drawn, so that one program serves all."""
    return DocumentLayout.from_chunk_documents(owners, N).replace(max_length=3)


def loop_scores(query, keys, owners, route, visible, mean, score="cosine"):
    scores, group = np.full((B, N), NO_SCORE), H // K
    scale = lambda x: np.linalg.norm(x) if score == "cosine" else D**0.25  # noqa: E731
    for b, d in zip(*np.nonzero(visible), strict=True):
        for c in np.flatnonzero(owners == d):
            key = np.repeat(keys[c].astype(np.float64), group, axis=0)
            tokens = [
                np.mean([q @ k / scale(q) / scale(k) for q, k in zip(token, key, strict=True)])
                for token in query[b, route[b]]
            ]
            if tokens:
                scores[b, d] = max(scores[b, d], np.mean(tokens) if mean else np.max(tokens))
    return scores


@pytest.mark.parametrize("score", ["cosine", "dot"])
@settings(max_examples=20)
@given(seed=seeds, owners=owners(), route=bits(B, T), visible=bits(B, N), mean=st.booleans())
def test_document_scores_equal_a_loop(score, seed, owners, route, visible, mean):
    query, keys = normal(seed, B, T, H, D), normal(seed + 1, C, K, D)
    # Unused chunks may hold anything.
    given_keys = np.where((owners == N)[:, None, None], np.nan, keys)
    got = scores_of(query, given_keys, layout_of(owners), route, visible, mean, score=score)
    np.testing.assert_allclose(got, loop_scores(query, keys, owners, route, visible, mean, score), atol=2e-6)


@pytest.mark.parametrize("mean", [False, True])
def test_the_mean_over_tokens_may_be_static_or_traced(mean):
    query, keys, route = normal(0, B, T, M), normal(1, C, M), np.array([[1, 0, 1], [1, 1, 0]], bool)
    layout = DocumentLayout.from_chunk_documents(np.repeat(np.arange(N + 1), 4)[:C], N)
    score = lambda mean: routing.document_scores(  # noqa: E731
        routing.averaged(jnp.asarray(query), route, mean), jnp.asarray(keys), layout, route=route
    )
    static, traced = score(mean), jax.jit(score)(mean)
    np.testing.assert_allclose(traced, static, atol=1e-6)
    products = np.einsum("btm,cm->btc", query, keys)
    per_chunk = [(p[r].mean if mean else p[r].max)(axis=0) for p, r in zip(products, route, strict=True)]
    want = [[chunk[layout.chunk_documents == d].max() for d in range(N)] for chunk in per_chunk]
    np.testing.assert_allclose(static, want, atol=1e-5)


def test_a_layer_of_stacked_keys():
    query, keys, route = jnp.asarray(normal(0, B, T, M)), jnp.asarray(normal(1, 3, C, M)), jnp.ones((B, T), bool)
    layout = layout_of(np.minimum(np.arange(C), N))
    score = jax.jit(lambda layer: routing.document_scores(query, keys, layout, route=route, layer=layer))
    for i in range(3):
        want = routing.document_scores(query, keys[i], layout, route=route)
        np.testing.assert_allclose(score(i), want, atol=1e-6)


def test_all_documents_are_visible_by_default():
    query, keys, route = jnp.asarray(normal(0, B, T, M)), jnp.asarray(normal(1, C, M)), jnp.ones((B, T), bool)
    layout = layout_of(np.minimum(np.arange(C), N))
    want = routing.document_scores(query, keys, layout, route=route, visible=jnp.ones((B, N), bool))
    assert (want > NO_SCORE / 2).all()
    np.testing.assert_array_equal(routing.document_scores(query, keys, layout, route=route), want)


@settings(max_examples=20)
@given(seed=seeds, owners=owners(), found=bits(B, N), top_k=st.sampled_from([1, 3, N, N + 4]))
def test_select_takes_the_best(seed, owners, found, top_k):
    layout = layout_of(owners)
    present = found & (np.asarray(layout.lengths) > 0)
    scores = np.where(present, normal(seed, B, N), NO_SCORE).astype(np.float32)
    selection = routing.select(jnp.asarray(scores), layout, top_k)
    k = min(top_k, N)
    assert all(x.shape == (B, k) for x in jax.tree.leaves(selection))
    for b in range(B):
        best = [d for d in np.argsort(-scores[b]) if present[b, d]][:k]
        count = len(best)
        np.testing.assert_array_equal(selection.documents[b, :count], best)
        np.testing.assert_array_equal(selection.scores[b, :count], scores[b, best])
        np.testing.assert_array_equal(selection.lengths[b, :count], [np.sum(owners == d) for d in best])
        np.testing.assert_array_equal(selection.starts[b, :count], [np.argmax(owners == d) for d in best])
        assert not np.any(selection.lengths[b, count:])
        assert (selection.scores[b, count:] == NO_SCORE).all()


def test_an_empty_memory_selects_nothing():
    layout = DocumentLayout.from_chunk_documents([], 0)
    assert (layout.num_documents, layout.num_chunks, layout.max_length) == (0, 0, 1)
    query = jnp.asarray(normal(0, B, T, M))
    scores = routing.document_scores(query, jnp.zeros((0, M)), layout, route=jnp.ones((B, T), bool))
    selection = routing.select(scores, layout, 3)
    assert scores.shape == selection.documents.shape == selection.starts.shape == (B, 0)


def test_gradients_reach_scores_through_the_selection_and_the_bias():
    layout = layout_of(np.minimum(np.arange(C), N))
    scores, beta = jnp.asarray(normal(3, B, N)), jnp.asarray([2.0, -1.0])
    kept = jax.grad(lambda s: routing.select(s, layout, 2).scores.sum())(scores)
    order = np.argsort(-np.asarray(scores), axis=1)
    want = np.zeros((B, N))
    np.put_along_axis(want, order[:, :2], 1, axis=1)
    np.testing.assert_array_equal(kept, want)
    # d/ds of beta * (s_d - max s): the best document's own gap is always 0, and it pushes the others down.
    bias = lambda s: bias_of(routing.select(s, layout, 2), beta)[:, :, 0].sum()  # noqa: E731
    np.put_along_axis(want, order[:, :1], -2, axis=1)
    np.put_along_axis(want, order[:, 1:2], 2, axis=1)
    np.testing.assert_allclose(jax.grad(bias)(scores), want)


def test_bias_is_the_gap_to_the_best_times_beta():
    scores = jnp.asarray([[0.9, 0.4, NO_SCORE], [NO_SCORE] * 3], jnp.float32)
    lengths = jnp.asarray([[2, 1, 0], [0, 0, 0]])
    zeros = jnp.zeros((B, 3), jnp.int32)
    selection = Selection(documents=zeros, scores=scores, starts=zeros, lengths=lengths)
    beta = jnp.asarray([20.0, -3.0])
    want = np.zeros((B, 3, 2))
    want[0, 1] = [-0.5 * 20, 0.5 * 3]
    np.testing.assert_allclose(bias_of(selection, beta), want, rtol=1e-6)
    total = lambda s, b: bias_of(selection.replace(scores=s), b).sum()  # noqa: E731
    grads = jax.grad(total, argnums=(0, 1))(scores, beta)
    assert all(np.isfinite(g).all() for g in grads) and not np.any(grads[0][1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_vectors_have_finite_gradients(dtype):
    query, keys = jnp.asarray(normal(0, B, T, H, D), dtype), jnp.asarray(normal(1, C, K, D), dtype)
    query, keys = query.at[0, 1, 2].set(0), keys.at[4].set(0)
    layout = layout_of(np.minimum(np.arange(C), N))
    route, visible = np.ones((B, T), bool), np.ones((B, N), bool)

    def loss(query, keys):
        return jnp.sum(scores_of(query, keys, layout, route, visible, False) ** 2)

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(query, keys)
    assert np.isfinite(value) and all(jnp.isfinite(g).all() for g in grads)
    assert not np.any(routing.l2_normalise(jnp.zeros(D, dtype)))


def test_bfloat16_vectors_are_normalised_in_float32():
    query, keys = jnp.asarray(normal(0, B, T, H, D), jnp.bfloat16), jnp.asarray(normal(1, C, K, D), jnp.bfloat16)
    for form in (lambda dtype: routing.routing_key(keys.astype(dtype), score="cosine"),
                 lambda dtype: routing.routing_query(query.astype(dtype), num_kv_heads=K, score="cosine")):  # fmt: skip
        assert form(jnp.bfloat16).dtype == jnp.float32
        np.testing.assert_allclose(form(jnp.bfloat16), form(jnp.float32), atol=1e-6)


@settings(max_examples=50)
@given(owners())
def test_layout_derives_the_ranges(owners):
    layout = DocumentLayout.from_chunk_documents(owners, N)
    assert (layout.num_documents, layout.num_chunks) == (N, C)
    assert layout.max_length == max(1, max(np.sum(owners == d) for d in range(N)))
    for d in range(N):
        length = int(layout.lengths[d])
        assert length == np.sum(owners == d)
        assert (owners[layout.starts[d] :][:length] == d).all()


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        ([0, 1, 0], "must be consecutive"),
        ([0, 3, 0], "must be consecutive"),
        ([2, 2, 1, 2], "must be consecutive"),
        ([0, 0, 4], r"0 to 3 \(.* 0 to 4"),
        ([-1, 0], r"0 to 3 \(.* -1 to 0"),
        ([[0, 1]], r"\[C\]"),
        ([0.5, 1.0], "integers"),
    ],
)
def test_layout_refuses(owners, message):
    with pytest.raises(ValueError, match=f"^DocumentLayout: .*{message}"):
        DocumentLayout.from_chunk_documents(owners, 3)
