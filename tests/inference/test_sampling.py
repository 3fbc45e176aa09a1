"""Choosing tokens: what may be chosen, how often, and that it hangs on nothing but logits, seed and count."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.inference.sampling import _keep, choose, from_settings
from msa_jax.inference.settings import Sampling

choose_jit = jax.jit(choose)


def pick(logits, settings, counts=None):
    return np.asarray(choose_jit(jnp.asarray(logits, jnp.float32), from_settings(settings, counts)))


def nucleus(logits, sampling):
    """Ids that may be drawn: one row, numpy, float64."""
    order = np.argsort(-logits, kind="stable")
    order = order[: sampling.top_k or len(order)]
    weights = np.exp((logits[order] - logits.max()) / sampling.temperature)
    total = np.cumsum(weights / weights.sum())
    size = len(order) if sampling.top_p == 1 else int(np.searchsorted(total, sampling.top_p + 1e-5)) + 1
    return set(order[:size].tolist())


def chi_square(draws, probabilities):
    """Pearson's statistic over its degrees of freedom; about 1 when the draws have these probabilities."""
    counts = np.bincount(draws, minlength=len(probabilities))
    expected = probabilities * len(draws)
    used = expected > 0
    assert counts[~used].sum() == 0
    return np.sum((counts[used] - expected[used]) ** 2 / expected[used]) / max(used.sum() - 1, 1)


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (dict(temperature=1.0), 7),
        (dict(temperature=0.5), 7),
        (dict(temperature=2.0, top_k=3), 3),
        (dict(temperature=1.0, top_p=0.8), 4),  # 0.35 + 0.25 + 0.14 < 0.8: the one that crosses comes along
        (dict(temperature=1.0, top_k=4, top_p=0.8), 3),  # of what top_k leaves: 0.74 / 0.84 >= 0.8
    ],
)
def test_the_distribution(sampling, kept):
    base = np.asarray([0.10, 0.35, 0.04, 0.25, 0.14, 0.07, 0.05])
    draws = 4096
    settings = [Sampling(seed=s, **sampling) for s in range(64)] * (draws // 64)
    counts = np.repeat(np.arange(draws // 64), 64)
    chosen = pick(np.tile(np.log(base) + 3, (draws, 1)), settings, counts)
    weights = base ** (1 / sampling["temperature"])
    weights[np.argsort(-base)[kept:]] = 0
    assert chi_square(chosen, weights / weights.sum()) < 3.5  # p < 0.002 at every degree of freedom here
    assert len(set(chosen.tolist())) == kept


def test_successive_tokens_and_neighbouring_seeds_are_independent():
    logits = np.zeros((1024, 2), np.float32)
    by_count = pick(logits, [Sampling(temperature=1, seed=5)] * 1024, np.arange(1024))
    by_seed = pick(logits, [Sampling(temperature=1, seed=s) for s in range(1024)])
    for bits in (by_count, by_seed):
        pairs = bits[:-1] * 2 + bits[1:]
        assert chi_square(pairs, np.full(4, 0.25)) < 5.5


@st.composite
def rows(draw):
    size = draw(st.integers(1, 37))
    number = st.integers(-24, 24).map(lambda x: x / 4) | st.sampled_from([-np.inf, 3e38, -3e38, 1e30])
    logits = np.asarray(draw(st.lists(number, min_size=size, max_size=size)), np.float32)
    hypothesis.assume(np.isfinite(logits).any())
    sampling = Sampling(
        temperature=draw(st.sampled_from([0.05, 0.7, 1.0, 3.0])),
        top_p=draw(st.sampled_from([1e-60, 1e-6, 0.3, 0.55, 0.9, 0.999, 1.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 5, 36, 37, 10**12])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return logits, sampling


@hypothesis.given(row=rows())
def test_only_what_top_k_and_nucleus_leave_is_chosen(row):
    logits, sampling = row
    width = 37
    padded = np.full(width, -np.inf, np.float32)
    padded[: len(logits)] = logits
    with np.errstate(all="ignore"):
        allowed = nucleus(padded.astype(np.float64), sampling)
    allowed = {i for i in allowed if np.isfinite(padded[i])}
    chosen = pick(np.tile(padded, (8, 1)), [sampling] * 8, range(8))
    assert set(chosen.tolist()) <= allowed


@hypothesis.given(data=st.data())
def test_every_token_of_the_nucleus_is_chosen_sometimes(data):
    row = np.asarray(data.draw(st.permutations([0.4, 0.3, 0.2, 0.1])))
    top_p, size = data.draw(st.sampled_from([(0.35, 1), (0.65, 2), (0.85, 3), (0.95, 4), (1.0, 4)]))
    settings = [Sampling(temperature=1.0, top_p=top_p, seed=data.draw(st.integers(0, 2**32 - 1)))] * 128
    chosen = pick(np.tile(np.log(row), (128, 1)), settings, range(128))
    assert set(chosen.tolist()) == set(np.argsort(-row)[:size].tolist())


def test_of_equal_logits_the_nucleus_keeps_the_lower_ids():
    logits = np.tile([1.0, 2.0, 1.0, 1.0, 1.0], (256, 1))
    chosen = pick(logits, [Sampling(temperature=1.0, top_k=3)] * 256, range(256))
    assert set(chosen.tolist()) == {0, 1, 2}


def test_top_p_1_and_top_k_0_leave_the_least_likely():
    scaled = jnp.full((2, 300), -20.0).at[:, 0].set(0)  # the sum of probabilities is 1 in float32 after the first
    kept = _keep(scaled, jnp.asarray([1.0, 0.999]), jnp.asarray([0, 0]))
    np.testing.assert_array_equal(jnp.sum(kept, axis=1), [300, 1])
    settings = [Sampling(temperature=1.0, top_p=1 if i else 0.5) for i in range(2048)]  # the others sort
    assert set(pick(np.zeros((2048, 16)), settings, range(2048))[1:].tolist()) == set(range(16))


@hypothesis.given(seed=st.integers(0, 2**31))
def test_temperature_0_is_the_first_largest(seed):
    logits = np.random.default_rng(seed).integers(-3, 4, (5, 33)).astype(np.float32)
    greedy = [Sampling(), Sampling(top_k=2, top_p=0.5), Sampling(seed=seed), Sampling(), Sampling()]
    mixed = greedy[:4] + [Sampling(temperature=1.0, top_p=0.9)]
    np.testing.assert_array_equal(pick(logits, greedy), logits.argmax(1))
    np.testing.assert_array_equal(pick(logits, mixed)[:4], logits.argmax(1)[:4])


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-42, 1e-60])
@pytest.mark.parametrize("extra", [{}, dict(top_p=0.9), dict(top_k=4)])
def test_a_tiny_temperature_takes_the_largest(temperature, extra):
    logits = np.random.default_rng(0).permutation(64)[None].repeat(16, 0).astype(np.float32) * 1e10
    chosen = pick(logits, [Sampling(temperature=temperature, **extra)] * 16, range(16))
    np.testing.assert_array_equal(chosen, logits.argmax(1))


@pytest.mark.parametrize("temperature", [1e6, 1e300])
def test_a_huge_temperature_draws_evenly_but_never_what_is_impossible(temperature):
    logits = np.asarray([5.0, -np.inf, 0.0, -30.0, -np.inf])
    chosen = pick(np.tile(logits, (3000, 1)), [Sampling(temperature=temperature, seed=s) for s in range(3000)])
    assert chi_square(chosen, np.asarray([1, 0, 1, 1, 0]) / 3) < 4.5


@hypothesis.given(seed=st.integers(0, 2**31), slot=st.integers(0, 6))
def test_a_question_draws_the_same_alone_and_in_any_slot(seed, slot):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((7, 97)) * 3).astype(np.float32)
    settings = [
        Sampling(
            temperature=rng.choice([0, 0.8, 1.3]), top_p=rng.choice([0.7, 1]), top_k=int(rng.choice([0, 9])), seed=i
        )
        for i in range(7)
    ]
    own = Sampling(temperature=0.9, top_p=float(rng.choice([0.8, 1])), top_k=int(rng.choice([0, 20])), seed=seed)
    settings[slot] = own
    counts = rng.integers(0, 99, 7)
    together = pick(logits, settings, counts)
    assert together[slot] == pick(logits[slot : slot + 1], [own], counts[slot : slot + 1])[0]


def _operations(jaxpr, inside_cond=False):
    for equation in jaxpr.eqns:
        yield equation.primitive.name, inside_cond
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from _operations(inner.jaxpr, inside_cond or equation.primitive.name == "cond")


def test_nothing_is_sorted_or_drawn_unless_a_question_samples():
    jaxpr = jax.make_jaxpr(choose)(jnp.zeros((3, 50)), from_settings([Sampling()] * 3)).jaxpr
    found = list(_operations(jaxpr))
    assert ("sort", True) in found and any(name.startswith("random_") and inside for name, inside in found)
    assert [name for name, inside in found if not inside and (name == "sort" or name.startswith("random_"))] == []
    text = choose_jit.lower(jnp.zeros((3, 50)), from_settings([Sampling()] * 3)).compile().as_text()
    assert text.count(" conditional(") == 2  # XLA kept both branches apart


def test_settings_become_arrays():
    state = from_settings([Sampling(), Sampling(temperature=1e-60, top_p=0.5, top_k=10**12, seed=2**32 - 1)], [3, 4])
    assert [x.dtype for x in jax.tree.leaves(state)] == [np.float32, np.float32, np.int32, np.uint32, np.int32]
    np.testing.assert_array_equal(state.temperature > 0, [False, True])
    np.testing.assert_allclose(1 / state.temperature[1], 1e30, rtol=1e-6)
    np.testing.assert_array_equal(state.count, [3, 4])
    assert (state.top_k[1], state.seed[1]) == (2**31 - 1, 2**32 - 1)
