"""What every implementation of `chunk_scores` must do. Kernels are interpreted; poisoned memory, races, bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chunk_scores, dispatch
from pallas_kernels.chunk_scores.api import NO_SCORE
from tests.kernels.implementations import IMPLEMENTATIONS, at_most_twice, matrix, running, skip_unless_supported

# Names say what a case is there for. B, T, C, M, dtype of query, of keys.
CASES = {
    "one token": (1, 1, 130, 16, "float32", "float32"),
    "one question": (1, 16, 300, 64, "bfloat16", "bfloat16"),
    "many questions of one token": (19, 1, 257, 32, "bfloat16", "bfloat16"),
    "few chunks": (2, 5, 7, 16, "float32", "float32"),
    "ragged everything": (3, 13, 389, 48, "float32", "float32"),
    "wide": (2, 9, 140, 272, "bfloat16", "bfloat16"),
    "several blocks of questions": (5, 203, 150, 16, "bfloat16", "bfloat16"),
    "int8 keys": (2, 11, 270, 64, "bfloat16", "int8"),
    "int8 keys, fp32 query": (2, 11, 270, 64, "float32", "int8"),
    "int8 both": (3, 6, 270, 64, "int8", "int8"),
}
GRADIENTS = [name for name, case in CASES.items() if "int8" not in case[4:]] + ["int8 keys"]


def make(name):
    """Arguments of a case: random, a quarter of the tokens masked, the last question wholly if there are more."""
    b, t, c, m, query_dtype, key_dtype = CASES[name]
    rng = np.random.default_rng(list(name.encode()))
    mask = rng.random((b, t)) > 0.25
    mask[:, rng.integers(t)] = True
    if b > 1:
        mask[-1] = False

    def array(shape, dtype):
        if dtype == "int8":
            return jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
        return jnp.asarray(rng.normal(size=shape), dtype)

    kwargs = dict(query_mask=jnp.asarray(mask))
    if key_dtype == "int8":
        kwargs["key_scale"] = jnp.asarray(rng.uniform(0.01, 0.02, c), jnp.float32)
    if query_dtype == "int8":
        kwargs["query_scale"] = jnp.asarray(rng.uniform(0.01, 0.02, (b, t)), jnp.float32)
    return array((b, t, m), query_dtype), array((c, m), key_dtype), kwargs


def wide(x, scale=None):
    x = np.asarray(x.astype(jnp.float32), np.float64)
    return x if scale is None else x * np.asarray(scale, np.float64)[..., None]


def products(query, keys, kwargs):
    """[B, T, C] in float64, NO_SCORE for tokens that do not route."""
    scored = np.einsum("btm,cm->btc", wide(query, kwargs.get("query_scale")), wide(keys, kwargs.get("key_scale")))
    return np.where(np.asarray(kwargs["query_mask"])[:, :, None], scored, NO_SCORE)


def naive(query, keys, kwargs):
    """The definition in the dtype of the operands: what the error of an implementation is compared with."""
    names = [name for name in ("query_scale", "key_scale") if name in kwargs]
    scale = {name: kwargs[name][..., None].astype(jnp.float32) for name in names}
    dtype = jnp.float32 if query.dtype == jnp.int8 else query.dtype
    query = (query * scale["query_scale"]).astype(dtype) if "query_scale" in scale else query
    keys = (keys * scale["key_scale"]).astype(dtype) if "key_scale" in scale else keys
    scored = jnp.einsum("btm,cm->btc", query, keys)
    return jnp.max(jnp.where(kwargs["query_mask"][:, :, None], scored.astype(jnp.float32), NO_SCORE), axis=1)


def supported(implementation, query, keys):
    skip_unless_supported("chunk_scores", implementation, query=query, keys=keys)
    return functools.partial(chunk_scores, implementation=implementation)


@pytest.mark.parametrize(
    ("name", "implementation"),
    matrix(CASES, tpu=["ragged everything", "several blocks of questions", "int8 both"], gpu=["one question"]),
)
def test_scores_are_the_definition(name, implementation):
    query, keys, kwargs = make(name)
    scores_of = supported(implementation, query, keys)
    want = products(query, keys, kwargs).max(axis=1)
    # What does not route may hold anything.
    if jnp.issubdtype(query.dtype, jnp.floating):
        query = jnp.where(kwargs["query_mask"][:, :, None], query, jnp.nan)
    with running(implementation):
        got = jax.device_get(scores_of(query, keys, **kwargs))
    assert got.dtype == np.float32 and got.shape == want.shape
    routes = np.asarray(kwargs["query_mask"]).any(axis=1)
    np.testing.assert_array_equal(got[~routes], np.float32(NO_SCORE))
    at_most_twice(got[routes], want[routes], naive(query, keys, kwargs)[routes])


@pytest.mark.parametrize(
    ("name", "implementation"), matrix(GRADIENTS, tpu=["ragged everything", "int8 keys"], gpu=["one question"])
)
def test_gradients_reach_the_winning_token_alone(name, implementation):
    query, keys, kwargs = make(name)
    scores_of = supported(implementation, query, keys)
    scored = products(query, keys, kwargs)
    winners, routes = scored.argmax(axis=1), np.asarray(kwargs["query_mask"]).any(axis=1)
    b, c = winners.shape
    grad = np.random.default_rng(0).normal(size=(b, c)).astype(np.float32)
    grad_scaled = grad * routes[:, None] * np.asarray(kwargs.get("key_scale", np.ones(c)))
    routed = grad_scaled[:, None, :] * (winners[:, None, :] == np.arange(query.shape[1])[None, :, None])
    want = np.einsum("btc,cm->btm", routed, wide(keys)), np.einsum("btc,btm->cm", routed, wide(query))

    floats = (0, 1) if jnp.issubdtype(keys.dtype, jnp.floating) else (0,)
    operands = (jnp.where(kwargs["query_mask"][:, :, None], query, jnp.nan), keys)

    def pulled(function, query, keys):
        def of(*wanted):
            return function(*wanted, *(query, keys)[len(wanted) :])

        return jax.vjp(of, *(query, keys)[: len(floats)])[1](jnp.asarray(grad))

    with running(implementation):
        got = jax.device_get(pulled(functools.partial(scores_of, **kwargs), *operands))
        again = jax.device_get(pulled(functools.partial(scores_of, **kwargs), *operands))
    plain = pulled(lambda q, k: naive(q, k, kwargs), query, keys)
    for i in floats:
        assert got[i].dtype == operands[i].dtype
        np.testing.assert_array_equal(got[i], again[i])
        at_most_twice(got[i], want[i], plain[i])


@pytest.mark.parametrize(("b", "implementation"), matrix([1, 9], tpu=[9]))
def test_the_first_of_equal_tokens_wins(b, implementation):
    # Integers, whose products are exact in any order of summation.
    rng = np.random.default_rng(0)
    token, keys = (jnp.asarray(rng.integers(-9, 10, shape), jnp.float32) for shape in [(b, 16), (130, 16)])
    query = jnp.tile(token[:, None], (1, 3, 1))
    scores_of = supported(implementation, query, keys)
    mask = jnp.ones((b, 3), bool).at[0, 0].set(False)
    with running(implementation):
        grad = jax.device_get(jax.grad(lambda q: scores_of(q, keys, query_mask=mask).sum())(query))
    first = np.zeros((b, 3), bool)
    first[:, 0], first[0] = True, [False, True, False]
    np.testing.assert_array_equal(np.abs(grad).max(axis=-1) > 0, first)


@pytest.mark.parametrize(("name", "implementation"), matrix(["ragged everything", "int8 both"], tpu=["int8 both"]))
def test_a_layer_is_read_where_it_lies(name, implementation):
    query, keys, kwargs = make(name)
    scores_of = supported(implementation, query, keys)
    other = jnp.full_like(keys, 7 if keys.dtype == jnp.int8 else jnp.nan)
    stacked = jnp.stack([other, keys, other])
    scales = {"key_scale": jnp.stack([kwargs["key_scale"] * x for x in (2, 1, 3)])} if "key_scale" in kwargs else {}
    with running(implementation):
        want = scores_of(query, keys, **kwargs)
        np.testing.assert_array_equal(scores_of(query, stacked, **kwargs | scales, layer=1), want)
        if keys.dtype == jnp.int8:
            return
        want_grad = jax.grad(lambda keys: scores_of(query, keys, **kwargs)[0].sum())(keys)
        grad = jax.grad(lambda keys: scores_of(query, keys, **kwargs, layer=jnp.int32(1))[0].sum())(stacked)
    np.testing.assert_array_equal(grad[1], want_grad)
    assert not grad[0].any() and not grad[2].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_unknown_dtype_runs_or_raises(implementation):
    query, keys = jnp.ones((1, 2, 16), jnp.float16), jnp.ones((5, 16), jnp.float16)
    with running(implementation):
        reason = dispatch.module("chunk_scores", implementation).unsupported(query=query, keys=keys)
        if reason is None:
            np.testing.assert_allclose(chunk_scores(query, keys, implementation=implementation), 16.0)
        else:
            with pytest.raises(NotImplementedError, match="float16"):
                chunk_scores(query, keys, implementation=implementation)
