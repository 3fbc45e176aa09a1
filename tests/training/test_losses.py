"""Losses against their definitions, values and gradients, and what the compiled program never holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.routing import NO_SCORE
from msa_jax.training import losses


def direct(hidden, table, targets):
    logits = jnp.einsum("...e,ve->...v", hidden, table, precision="highest")
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("sizes", [(31, 7), (30, 10), (13, 64)], ids=["padded", "divided", "one block"])
def test_token_losses_equal_the_direct_form(sizes):
    vocab, block = sizes
    rng = np.random.default_rng(vocab)
    hidden = jnp.asarray(rng.normal(size=(3, 5, 11)), jnp.float32)
    table = jnp.asarray(3 * rng.normal(size=(vocab, 11)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (3, 5)), jnp.int32).at[0, 0].set(vocab - 1)
    cotangent = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)

    @jax.jit
    def both(hidden, table):
        want, want_vjp = jax.vjp(lambda h, w: direct(h, w, targets), hidden, table)
        got, got_vjp = jax.vjp(lambda h, w: losses.token_losses(h, w, targets, block=block), hidden, table)
        return (want, *want_vjp(cotangent)), (got, *got_vjp(cotangent))

    for want, got in zip(*both(hidden, table), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-5)


def test_bfloat16_gradient_of_hidden_is_summed_in_float32():
    rng = np.random.default_rng(0)
    table = jnp.asarray(1 + rng.normal(size=(4096, 8)), jnp.bfloat16)
    hidden = jnp.asarray(0.01 * rng.normal(size=(6, 8)), jnp.bfloat16)
    targets = jnp.arange(6)

    def gradient(hidden, table, block):
        loss = lambda h: losses.token_losses(h, table, targets, block=block).sum()  # noqa: E731
        return np.asarray(jax.grad(loss)(hidden), np.float64)

    want = gradient(hidden.astype(jnp.float32), table.astype(jnp.float32), 4096)
    # Over these 1024 blocks, a running sum in bfloat16 errs by 0.5.
    np.testing.assert_allclose(gradient(hidden, table, 4), want, atol=0.02)


def test_lm_loss_ignores_what_has_no_weight():
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32).at[0, 1].set(jnp.inf)
    table = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    targets = jnp.asarray([[1, -100, 3], [-100, 5, 6]])
    weights = jnp.asarray([[1.0, 0.0, 0.25], [0.0, 1.0, 2.0]])
    total, weight = losses.lm_loss(hidden, table, targets, weights)
    kept = np.asarray(weights) > 0
    each = direct(hidden[kept], table, targets[kept])
    np.testing.assert_allclose(total, jnp.sum(each * weights[kept]), rtol=1e-5)
    assert weight == 4.25
    with pytest.raises(ValueError, match=r"need hidden .* got \(2, 3, 5\), \(7, 5\), \(2, 2\)"):
        losses.token_losses(hidden, table, targets[:, :2])


@pytest.mark.parametrize("vocab", [151_936, 151_937])
def test_no_array_of_tokens_by_vocabulary(vocab):
    tokens, width = 4096, 64
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocab, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
    loss = lambda h, w, t: losses.token_losses(h, w, t).mean()  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    # A few [tokens, block] arrays and copies of the table; [tokens, V] alone is 2.5 GB.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * tokens * vocab * 4


def test_vocabulary_block_divides_when_it_can():
    assert losses.vocabulary_block(151_936, 4096) == 2374
    assert losses.vocabulary_block(4000, 4096) == 4000
    assert losses.vocabulary_block(151_937, 4096) == 4096  # prime: padded


def one_sample(scores, relevant, method, temperature, gamma):
    """The definitions of the paper and the published code, positive by positive, in float64."""
    s = np.asarray(scores, np.float64) / temperature
    terms = []
    for i in np.flatnonzero(relevant):
        rivals = ~relevant if "decoupled" in method else np.arange(len(s)) != i
        p = np.exp(s[i]) / (np.exp(s[i]) + np.exp(s[rivals]).sum())
        terms.append(-np.log(p) * ((1 - p) ** gamma if "focal" in method else 1))
    return np.mean(terms) if terms else 0.0


@pytest.mark.parametrize("method", losses.ROUTER_LOSSES)
def test_router_loss_follows_its_definition(method):
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(2, 3, 7)).astype(np.float32) * 0.3
    relevant = rng.random((3, 7)) < 0.4
    relevant[1] = False
    visible = rng.random((3, 7)) < 0.8
    got = losses.router_loss(
        jnp.where(visible, scores, NO_SCORE), relevant, visible, method=method, temperature=0.1, gamma=3.0
    )
    for i in range(2):
        for b in range(3):
            seen = visible[b]
            want = one_sample(scores[i, b, seen], relevant[b, seen], method, 0.1, 3.0)
            np.testing.assert_allclose(got[i, b], want, rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(losses.has_positive(relevant, visible), (relevant & visible).any(1))


@pytest.mark.parametrize("method", losses.ROUTER_LOSSES)
@pytest.mark.parametrize("positives", [0, 2, 5], ids=["none", "some", "no negatives"])
def test_router_loss_has_finite_gradients_and_none_for_invisible(method, positives):
    relevant = jnp.arange(6)[None] < positives
    visible = jnp.arange(6)[None] < 5
    # One positive so sure that its probability rounds to 1, and a sentinel where nothing is visible.
    scores = jnp.asarray([[300.0, 0.1, -0.2, 0.3, 0.0, NO_SCORE]])
    value, gradient = jax.value_and_grad(
        lambda s: losses.router_loss(s, relevant, visible, method=method, temperature=1e-3).sum()
    )(scores)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert gradient[0, 5] == 0
    assert (value == 0) == (positives == 0 or (positives == 5 and "decoupled" in method))


def test_router_loss_names_the_methods():
    with pytest.raises(ValueError, match="infonce_decoupled_focal.*got 'mse'"):
        losses.router_loss(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), jnp.ones((1, 2), bool), method="mse")


def test_recall_counts_hits_among_the_visible_best():
    scores = jnp.asarray([[0.9, 0.8, 0.7, 0.6, 0.5]])
    relevant = jnp.asarray([[False, True, True, False, True]])
    visible = jnp.asarray([[False, True, True, True, True]])
    recall = lambda n, **kw: float(losses.recall_at(scores, relevant, visible, n, **kw)[0])  # noqa: E731
    assert recall(1) == 1.0  # the best visible one; at most one can be found
    assert recall(1, most=10) == pytest.approx(1 / 3)
    assert recall(3) == pytest.approx(2 / 3)
    assert recall(99) == 1.0
    assert float(losses.recall_at(scores, relevant, jnp.zeros((1, 5), bool), 5)[0]) == 0.0


def test_router_metrics_of_a_batch():
    scores = jnp.asarray([[[3.0, 2, 1], [3, 2, 1], [1, 2, 3]], [[1.0, 2, 3], [1, 2, 3], [1, 2, 3]]])
    relevant = jnp.asarray([[True, False, False], [False, True, False], [False, False, False]])
    visible = jnp.ones((3, 3), bool).at[2].set(False)
    selected = jnp.asarray([[[0, 1], [0, 1], [0, 1]], [[2, 1], [2, 1], [2, 1]]])
    lengths = jnp.asarray([[[4, 1], [4, 1], [0, 0]], [[2, 1], [2, 0], [0, 0]]])
    metrics = losses.router_metrics(
        scores, relevant, visible, selected=selected, lengths=lengths, recall=(1, 2)
    )
    got = {name: float(value) for name, value in metrics.items()}
    assert got == pytest.approx({
        "recall@1/router_0": 0.5, "recall@1/router_1": 0.0, "recall@1": 0.25,
        "recall@2/router_0": 1.0, "recall@2/router_1": 0.5, "recall@2": 0.75,
        "precision": 2 / 7, "distinct": 4 / 7, "empty": 2 / 6,
    })  # fmt: skip
