"""Selection of documents: the max over their chunks and the top k, each in every form it can take."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax import AttentionConfig, MemorySparseAttention, routing
from msa_jax.errors import ConfigError
from msa_jax.memory import ChunkStates, DocumentLayout
from msa_jax.routing import NO_SCORE, exact
from tests.routing.test_routing import B, C, N, T, normal, owners

seeds = st.integers(0, 2**31)


def layout_of(owners):
    """A layout whose static bound does not depend on what was drawn, so that one program serves all."""
    return DocumentLayout.from_chunk_documents(owners, N).replace(max_length=3)


@pytest.mark.parametrize(
    ("reads", "a_pass"), [(99, 16), (99, 2), (0, 16)], ids=["ranges", "ranges in passes", "scatter"]
)
def test_the_document_max_and_its_gradient_in_every_form(reads, a_pass, monkeypatch):
    monkeypatch.setattr(exact, "_MOST_RANGE_READS", reads)
    monkeypatch.setattr(exact, "_CHUNKS_A_PASS", a_pass)
    document_max = jax.jit(lambda x, layout: exact._document_max(x, layout))  # traced anew for each form
    program = str(jax.make_jaxpr(document_max)(jnp.zeros((B, C)), layout_of(np.full(C, N))))
    assert ("scatter" in program) == (reads == 0) and ("scan[" in program) == (a_pass == 2)
    pull_back = jax.jit(lambda x, layout, grad: jax.vjp(lambda x: document_max(x, layout), x)[1](grad)[0])

    @settings(max_examples=30)
    @given(seeds, owners())
    def check(seed, owners):
        layout = layout_of(owners)
        scores = np.where(owners == N, np.nan, normal(seed, B, C))
        want, want_grad, grad = np.full((B, N), NO_SCORE), np.zeros((B, C)), normal(seed + 1, B, N)
        for b, d in np.ndindex(B, N):
            chunks = np.flatnonzero(owners == d)
            if len(chunks):
                best = chunks[np.argmax(scores[b, chunks])]
                want[b, d], want_grad[b, best] = scores[b, best], grad[b, d]
        got = np.asarray(document_max(scores, layout))
        present = np.asarray(layout.lengths) > 0
        np.testing.assert_array_equal(got[:, present], want[:, present].astype(np.float32))
        assert (got[:, ~present] <= NO_SCORE).all()
        got_grad = pull_back(scores, layout, np.where(present, grad, 0).astype(np.float32))
        np.testing.assert_allclose(got_grad, want_grad, rtol=1e-6)

    check()


def test_of_equal_chunks_the_first_gets_the_gradient():
    layout = layout_of(np.array([N, 0, 0, 0, 2, 2] + [N] * (C - 6)))
    scores = jnp.zeros((1, C)).at[0, 1].set(-1.0)
    grad = jax.grad(lambda s: exact._document_max(s, layout)[0, jnp.array([0, 2])] @ jnp.array([3.0, 5.0]))(scores)
    np.testing.assert_array_equal(grad[0], np.eye(C)[2] * 3 + np.eye(C)[4] * 5)


@st.composite
def tied_scores(draw):
    """[B, N] of few different values, so that most are equal, with absent documents among them."""
    shape = draw(st.sampled_from([(1, 3001), (2, 1303), (3, 331), (2, 47)]))
    count, extra = draw(st.integers(1, 6)), draw(st.sampled_from([0.0, 2 / shape[1], 0.01]))
    rng = np.random.default_rng(draw(seeds))
    scores = rng.choice(np.array([NO_SCORE, -1.5, 0.0, 0.25, 0.5, 0.75], np.float32)[:count], shape)
    return np.where(rng.random(shape) < extra, rng.choice(np.float32([1, 2]), shape), scores)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_exact_top_k_is_that_of_jax_ties_included(k, monkeypatch):
    monkeypatch.setattr(exact, "_TWO_LEVELS_FROM", 1)
    selected = jax.jit(lambda s: routing.top_k_indices(s, k))

    def widths(jaxpr):
        inner = (p for e in jaxpr.eqns for p in e.params.values() if hasattr(p, "jaxpr"))
        own = [e.invars[0].aval.shape[1] for e in jaxpr.eqns if e.primitive.name == "top_k"]
        return own + sum((widths(p.jaxpr) for p in inner), [])

    # Two selections, neither from all N.
    assert [w < 3001 // 7 for w in widths(jax.make_jaxpr(selected)(jnp.zeros((1, 3001))).jaxpr)] == [True, True]

    @settings(max_examples=60)
    @given(tied_scores())
    def check(scores):
        np.testing.assert_array_equal(selected(scores), jax.lax.top_k(scores, k)[1])

    check()


def test_few_scores_are_selected_from_at_once():
    program = str(jax.make_jaxpr(lambda s: routing.top_k_indices(s, 3))(jnp.zeros((1, 3001))))
    assert program.count("top_k[") == 1 and "reduce_max" not in program


@pytest.mark.parametrize("recall", [0.5, 0.95])
def test_approximate_top_k_finds_what_its_target_says(recall):
    layout = DocumentLayout.from_chunk_documents(np.arange(4001), 4001)
    scores = jnp.asarray(normal(0, 5, 4001))
    choose = functools.partial(routing.select, layout=layout, k=16)
    approximate = jax.jit(lambda s: choose(s, recall=recall))
    program = str(jax.make_jaxpr(approximate)(scores))
    assert f"recall_target={recall}" in program and "approx_top_k" in program
    got, want = approximate(scores), choose(scores)
    found = [np.isin(g, w).mean() for g, w in zip(got.documents, want.documents, strict=True)]
    assert np.mean(found) >= recall
    np.testing.assert_array_equal(got.scores, np.take_along_axis(scores, got.documents, axis=1))
    assert (np.diff(got.scores) <= 0).all() and (got.lengths == 1).all()


def test_a_layer_selects_as_its_config_says():
    config = AttentionConfig(hidden_size=8, head_dim=4, chunk_size=2, top_k_documents=2)
    layout = layout_of(np.minimum(np.arange(C), N))
    x, positions = jnp.asarray(normal(0, B, T, 8)), jnp.zeros((B, T), jnp.int32)
    states = ChunkStates(*(jnp.asarray(normal(i, C, 2, 4)) for i in range(3)))

    def program(**changes):
        layer = MemorySparseAttention(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))
        call = lambda x: layer(x, positions=positions, memory=layer.memory(states, layout)).out  # noqa: E731
        return str(jax.make_jaxpr(call)(x))

    assert "recall_target=0.75" in program(retriever="approximate:recall=0.75")
    assert "approx_top_k" not in program()


@pytest.mark.parametrize(
    ("retriever", "message"),
    [
        ("fast", "retriever must be one of ('exact', 'approximate', 'two_level'), got 'fast'."),
        (4, "retriever must be one of ('exact', 'approximate', 'two_level'), got 4."),
        ("approximate:recall=0", "retriever approximate: recall must lie in (0, 1], got 0.0."),
        ("approximate:recall=1.01", "retriever approximate: recall must lie in (0, 1], got 1.01."),
        ("approximate:recall=nan", "retriever approximate: recall must lie in (0, 1], got nan."),
        (
            "approximate:recall=high",
            "retriever 'approximate:recall=high': 'recall=high' is no setting of it; it has approximate:recall=FLOAT.",
        ),
        ("exact:recall=1", "retriever 'exact:recall=1': 'recall=1' is no setting of it; it has none."),
        ("two_level:groups=0", "retriever two_level: group and groups must be at least 1, got 32 and 0."),
    ],
)
def test_retrievers_that_there_are_not(retriever, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        AttentionConfig(retriever=retriever)
