"""`chunk_scores` on Hopper: kernels interpreted, with races and poisoned memory, against float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chunk_scores import gpu, gpu_config, reference
from tests.kernels.implementations import quick

NO_SCORE = reference.NO_SCORE


@contextlib.contextmanager
def interpreted():
    """A scope in which kernels are interpreted; a race raises."""
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    with plgpu.force_gpu_interpret_mode(params):
        yield


def make(b, t, c, m, query_dtype, key_dtype, seed=0):
    """query, keys, mask, query_scale, key_scale; a token in three does not route and is NaN if it can be."""
    rng = np.random.default_rng(seed)

    def draw(*shape, dtype):
        if dtype == "int8":
            return jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
        return jnp.asarray(rng.normal(size=shape), dtype)

    query, keys = draw(b, t, m, dtype=query_dtype), draw(c, m, dtype=key_dtype)
    mask = jnp.asarray(rng.random((b, t)) > 0.3)
    query_scale = key_scale = None
    if query_dtype == "int8":
        query_scale = jnp.where(mask, jnp.asarray(rng.uniform(0.1, 2, (b, t)), jnp.float32), jnp.nan)
    else:
        query = jnp.where(mask[..., None], query, jnp.nan)
    if key_dtype == "int8":
        key_scale = jnp.asarray(rng.uniform(0.1, 2, c), jnp.float32)
    return query, keys, mask, query_scale, key_scale


def definition(query, keys, mask, query_scale, key_scale):
    """[B, T, C] in float64: NO_SCORE where a token does not route."""
    scored = np.einsum("btm,cm->btc", *(np.asarray(x.astype(jnp.float32), np.float64) for x in (query, keys)))
    for scale, axes in ((query_scale, (..., None)), (key_scale, (None, None))):
        scored = scored if scale is None else scored * np.asarray(scale, np.float64)[axes]
    return np.where(np.asarray(mask)[..., None], scored, NO_SCORE)


def check(args):
    want = definition(*args)
    # A function of its own: JAX would find the trace of an equal one, made before something was patched.
    forward = jax.jit(lambda *args: gpu.forward.__wrapped__(*args, winners=True))
    with interpreted():
        scores, won = jax.device_get(forward(*args))
        again = jax.device_get(forward(*args))
    np.testing.assert_array_equal(scores, again[0])
    np.testing.assert_array_equal(won, again[1])
    best = want.max(axis=1)
    plain = np.abs(np.asarray(reference.forward(*args, winners=False)[0]) - best).max()
    assert scores.shape == best.shape and scores.dtype == np.float32
    size = np.abs(best[best > NO_SCORE / 2]).max(initial=1)
    assert np.abs(scores - best).max() <= 2 * plain + 1e-6 * size
    assert won.dtype == np.int32
    np.testing.assert_array_equal(won, want.argmax(axis=1))


# Each names what it is there for: B, T, C, M, dtype of query, of keys.
CASES = {
    "one token, a tile and a bit": (1, 1, 131, 64, "bfloat16", "bfloat16"),
    "M below a copy": (2, 3, 77, 24, "bfloat16", "bfloat16"),
    "question-major": (3, 16, 130, 128, "bfloat16", "bfloat16"),
    "token-major": (9, 3, 70, 64, "bfloat16", "bfloat16"),
    "several narrow copies a stage": (1, 7, 140, 144, "bfloat16", "bfloat16"),
    "a ring that turns": (1, 64, 700, 192, "bfloat16", "bfloat16"),
    "fp32": (2, 5, 70, 80, "float32", "float32"),
    "fp32 token-major": (17, 2, 70, 16, "float32", "float32"),
    "fp32 query": (1, 5, 70, 64, "float32", "bfloat16"),
    "fp32 keys": (1, 5, 70, 32, "bfloat16", "float32"),
    "fp16 query": (1, 5, 70, 32, "float16", "bfloat16"),
    "int8 keys": (2, 5, 70, 256, "bfloat16", "int8"),
    "int8 keys, narrow copies": (2, 5, 70, 160, "bfloat16", "int8"),
    "int8 keys, fp32 query": (1, 3, 70, 48, "float32", "int8"),
    "int8 both": (2, 5, 70, 192, "int8", "int8"),
    "int8 both, token-major": (17, 2, 70, 48, "int8", "int8"),
}


@pytest.mark.parametrize("name", quick(CASES, "question-major", "token-major", "fp32", "int8 both"))
def test_scores_and_winners_are_the_definition(name, monkeypatch):
    monkeypatch.setattr(gpu_config, "multiprocessors", lambda: 2)
    check(make(*CASES[name]))


@pytest.mark.parametrize("name", quick(["question-major", "token-major", "fp32"], "question-major"))
@pytest.mark.parametrize("sizes", [dict(query_bytes=0, stages=3), dict(accumulators=64 * 64)], ids=["streamed", "cut"])
def test_a_query_too_large_to_hold(name, sizes, monkeypatch):
    """Streamed with the keys; or in more than one block of columns, whose max runs on."""
    monkeypatch.setattr(gpu_config, "multiprocessors", lambda: 1)
    monkeypatch.setitem(gpu_config.BLOCKS, "default", gpu_config.Blocks(**sizes))
    b, t, _, *rest = CASES[name]
    args = make(b, t if name == "token-major" else t + 64, 150, *rest, seed=1)
    plan = gpu_config.plan(*args[:2], winners=True)
    assert plan.by_token == (name == "token-major")
    assert plan.blocks > 1 if "accumulators" in sizes else not plan.resident
    check(args)


def test_a_question_without_tokens_and_a_key_that_is_not_a_number():
    query, keys, *_ = make(2, 3, 70, 64, "bfloat16", "bfloat16")
    mask = jnp.asarray([[True, False, True], [False] * 3])
    keys = keys.at[5].set(jnp.nan)
    query = jnp.where(mask[..., None], jnp.nan_to_num(query), jnp.nan)
    with interpreted():
        scores, won = jax.device_get(gpu.forward(query, keys, mask, None, None, winners=True))
    np.testing.assert_array_equal(scores[1], np.float32(NO_SCORE))
    np.testing.assert_array_equal(won[1], 0)
    others = np.arange(70) != 5
    assert np.isfinite(scores[0, others]).all() and won.min() >= 0 and won.max() < 3
    np.testing.assert_array_equal(won[0, others] == 1, False)


def test_the_layer_asked_for_scores():
    query, keys, mask, _, key_scale = make(1, 3, 70, 32, "bfloat16", "int8")
    banks, scales = jnp.stack([keys, keys[::-1]]), jnp.stack([key_scale, key_scale[::-1]])
    with interpreted():
        for layer in range(2):
            got = gpu.forward(query, banks, mask, None, scales, jnp.int32(layer), winners=False)[0]
            want = gpu.forward(query, banks[layer], mask, None, scales[layer], winners=False)[0]
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("b", quick([1, 9], 9))
def test_the_first_of_equal_tokens_wins(b):
    rng = np.random.default_rng(0)  # small integers: a product is exact in any order
    token, keys = (jnp.asarray(rng.integers(-4, 5, shape), jnp.bfloat16) for shape in ((b, 1, 64), (70, 64)))
    mask = jnp.ones((b, 5), bool).at[0, :2].set(False)
    with interpreted():
        _, won = gpu.forward(jnp.tile(token, (1, 5, 1)), keys, mask, None, None, winners=True)
    np.testing.assert_array_equal(won, np.where(np.arange(b) == 0, 2, 0)[:, None].repeat(70, axis=1))


@pytest.mark.parametrize("b", quick([1, 9], 9))
def test_scores_do_not_depend_on_whether_winners_are_asked_for(b):
    args = make(b, 3, 70, 32, "bfloat16", "bfloat16")
    with interpreted():
        scores, nothing = gpu.forward(*args, winners=False)
        assert nothing is None
        np.testing.assert_array_equal(scores, gpu.forward(*args, winners=True)[0])


GRADIENTS = {
    "bf16": (2, 3, 131, 64, "bfloat16", "bfloat16"),
    "fp32, tokens over a tile": (1, 70, 70, 144, "float32", "float32"),
    "mixed": (3, 5, 70, 24, "bfloat16", "float32"),
    "int8 keys": (2, 5, 70, 160, "float32", "int8"),
    "fp16 query": (1, 5, 200, 16, "float16", "bfloat16"),
}


@pytest.mark.parametrize("name", quick(GRADIENTS, "bf16", "int8 keys"))
def test_gradients_are_those_of_the_winners(name, monkeypatch):
    monkeypatch.setattr(gpu_config, "multiprocessors", lambda: 1)
    b, t, c, m, query_dtype, key_dtype = GRADIENTS[name]
    query, keys, *_ = make(*GRADIENTS[name])
    query = jnp.nan_to_num(query)
    rng = np.random.default_rng(1)
    winners = rng.integers(0, t, (b, c)).astype(np.int32)
    grad = rng.normal(size=(b, c)).astype(np.float32)
    wanted = (True, key_dtype != "int8")
    with interpreted():
        got = jax.device_get(gpu.backward(query, keys, winners, grad, wanted=wanted))
        again = jax.device_get(gpu.backward(query, keys, winners, grad, wanted=wanted))
    routed = (winners[:, None] == np.arange(t)[None, :, None]) * grad[:, None].astype(np.float64)
    wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in (query, keys)]
    want = np.einsum("btc,cm->btm", routed, wide[1]), np.einsum("btc,btm->cm", routed, wide[0])
    for i, asked in enumerate(wanted):
        if not asked:
            assert got[i] is None
            continue
        dtype = (query, keys)[i].dtype
        assert got[i].dtype == dtype
        np.testing.assert_array_equal(got[i], again[i])
        rounding = 1e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
        scale = np.abs(want[i]).max()
        np.testing.assert_allclose(got[i].astype(np.float64), want[i], rtol=rounding, atol=1e-6 * scale)


def test_only_what_is_wanted_is_computed():
    query, keys, *_ = make(1, 3, 70, 16, "float32", "float32")
    winners, grad = jnp.zeros((1, 70), jnp.int32), jnp.ones((1, 70))
    with interpreted():
        text = str(jax.make_jaxpr(lambda *x: gpu.backward(*x, wanted=(False, True))[1])(query, keys, winners, grad))
    assert "_keys_kernel" in text and "_query_kernel" not in text
