"""`chunk_scores` on Hopper: kernels interpreted, with races and poisoned memory; lowered for CUDA at full size."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import chunk_scores
from pallas_kernels.chunk_scores import gpu, gpu_config, gpu_terms, reference

NO_SCORE = reference.NO_SCORE
FULL = 1_562_500  # 100M tokens; no multiple of 8, let alone of a tile


@contextlib.contextmanager
def interpreted():
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    with plgpu.force_gpu_interpret_mode(params):
        yield
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # no public word for "were there races"

    assert not gpu_callbacks.get_races().races_found


def device(kind="NVIDIA H200"):
    described = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=described))


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
    forward = jax.jit(gpu.forward.__wrapped__, static_argnames="winners")  # what is patched is read when traced
    with interpreted():
        scores, won = jax.device_get(forward(*args, winners=True))
        again = jax.device_get(forward(*args, winners=True))
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


@pytest.mark.parametrize("name", CASES)
def test_scores_and_winners_are_the_definition(name, monkeypatch):
    monkeypatch.setattr(gpu_config, "multiprocessors", lambda: 2)
    check(make(*CASES[name]))


@pytest.mark.parametrize("name", ["question-major", "token-major", "fp32", "int8 both"])
@pytest.mark.parametrize("sizes", [dict(query_bytes=0, stages=3), dict(accumulators=64 * 16)], ids=["streamed", "cut"])
def test_a_query_too_large_to_hold(name, sizes, monkeypatch):
    """Streamed with the keys; or in more than one block of columns, whose max runs on."""
    monkeypatch.setattr(gpu_config, "multiprocessors", lambda: 1)
    monkeypatch.setitem(gpu_config.BLOCKS, "default", gpu_config.Blocks(**sizes))
    b, t, _, *rest = CASES[name]
    args = make(b, t + 8, 150, *rest, seed=1)
    plan = gpu_config.plan(*args[:2], winners=True)
    assert plan.groups * plan.blocks > 1 if "accumulators" in sizes else not plan.resident
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


@pytest.mark.parametrize("b", [1, 9])
def test_the_first_of_equal_tokens_wins(b):
    rng = np.random.default_rng(0)  # small integers: a product is exact in any order
    token, keys = (jnp.asarray(rng.integers(-4, 5, shape), jnp.bfloat16) for shape in ((b, 1, 64), (70, 64)))
    mask = jnp.ones((b, 5), bool).at[0, :2].set(False)
    with interpreted():
        _, won = gpu.forward(jnp.tile(token, (1, 5, 1)), keys, mask, None, None, winners=True)
    np.testing.assert_array_equal(won, np.where(np.arange(b) == 0, 2, 0)[:, None].repeat(70, axis=1))


@pytest.mark.parametrize("b", [1, 9])
def test_scores_do_not_depend_on_whether_winners_are_asked_for(b):
    args = make(b, 3, 70, 32, "bfloat16", "bfloat16")
    with interpreted():
        scores, nothing = gpu.forward(*args, winners=False)
        assert nothing is None
        np.testing.assert_array_equal(scores, gpu.forward(*args, winners=True)[0])


@settings(max_examples=30)
@given(st.lists(st.floats(2**-80, 2**80, width=32), min_size=1, max_size=9))
def test_a_float32_is_the_sum_of_its_terms(values):
    x = np.array(values + [-v for v in values], np.float32)
    terms = jax.jit(gpu_terms.split)(x)
    assert [term.dtype for term in terms] == [jnp.bfloat16] * 3
    np.testing.assert_array_equal(sum(np.asarray(term.astype(jnp.float32), np.float64) for term in terms), x)


GRADIENTS = {
    "bf16": (2, 3, 131, 64, "bfloat16", "bfloat16"),
    "fp32, tokens over a tile": (1, 70, 70, 144, "float32", "float32"),
    "mixed": (3, 5, 70, 24, "bfloat16", "float32"),
    "int8 keys": (2, 5, 70, 160, "float32", "int8"),
    "fp16 query": (1, 5, 200, 16, "float16", "bfloat16"),
}


@pytest.mark.parametrize("name", GRADIENTS)
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


LOWERED = [
    (1, 64, FULL, 1024, "bfloat16", "bfloat16"),
    (1, 64, FULL, 1024, "bfloat16", "int8"),
    (1, 64, FULL, 1024, "int8", "int8"),
    (1, 64, FULL, 1024, "float32", "float32"),
    (64, 1, FULL, 1024, "bfloat16", "bfloat16"),
    (64, 3, 1001, 1024, "int8", "int8"),
    (1, 64, FULL, 2048, "bfloat16", "bfloat16"),
    (64, 512, FULL, 2048, "bfloat16", "int8"),
    (7, 512, 16384, 2048, "float32", "float32"),
    (1, 1, 77, 8, "bfloat16", "bfloat16"),
    (5, 9, 1001, 272, "bfloat16", "bfloat16"),
]


@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_lowers_for_cuda(case):
    """As far as this host can check: layouts, copies and matrix instructions are those of the hardware."""
    b, t, c, m, query_dtype, key_dtype = case
    query, keys = jax.ShapeDtypeStruct((b, t, m), query_dtype), jax.ShapeDtypeStruct((c, m), key_dtype)
    scales = {}
    if query_dtype == "int8":
        scales["query_scale"] = jax.ShapeDtypeStruct((b, t), jnp.float32)
    if key_dtype == "int8":
        scales["key_scale"] = jax.ShapeDtypeStruct((c,), jnp.float32)
    scores = functools.partial(chunk_scores, implementation="gpu")
    floats = tuple(i for i, dtype in enumerate((query_dtype, key_dtype)) if dtype != "int8")

    def trained(query, keys, scales):
        value, pull = jax.vjp(
            lambda *x: scores(*(x + (query, keys)[len(x) :]), **scales), *(query, keys)[: len(floats)]
        )
        return pull(value)

    with device():
        programs = [jax.jit(lambda q, k, s: scores(q, k, **s))] + ([jax.jit(trained)] if floats else [])
        for program, kernels in zip(programs, (1, 1 + len(floats)), strict=False):
            text = program.trace(query, keys, scales).lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("custom_call @mosaic_gpu") == kernels
            # The kernel's operand is the bank itself: nobody pads or converts it.
            assert "stablehlo.pad %arg1" not in text and "stablehlo.slice %arg1" not in text


def plans():
    dtypes = [("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]
    dtypes += [("bfloat16", "int8"), ("float32", "int8"), ("int8", "int8")]
    return st.tuples(
        st.integers(1, 64), st.integers(1, 512), st.integers(1, 128), st.sampled_from(dtypes), st.booleans()
    )


@settings(max_examples=200)
@given(plans())
def test_every_size_fits_the_hardware(case):
    b, t, width, (query_dtype, key_dtype), winners = case
    query, keys = (
        jax.ShapeDtypeStruct((b, t, 16 * width), query_dtype),
        jax.ShapeDtypeStruct((999, 16 * width), key_dtype),
    )
    if gpu_config.strip_width(16 * width, query.dtype, keys.dtype) is None:
        return
    p = gpu_config.plan(query, keys, winners)
    assert p.groups * p.questions >= b and p.blocks * p.tokens >= t
    assert p.columns % 8 == 0 and p.columns <= 256 and p.rows % 64 == 0
    assert p.rows * p.columns <= 16384 and (not p.by_token or p.rows * p.columns <= 8192)
    assert p.strip * p.copies * p.steps >= 16 * width
    # A tensor copy takes at most 256 along a dimension; rows of eight count once.
    assert 2 * p.rows <= 256 and p.pieces * p.columns // 8 <= 256
    assert p.stages >= 3
    itemsize = 1 if query_dtype == "int8" else 2
    strips = p.strip * p.copies * (p.steps * p.groups * p.blocks if p.resident else p.stages)
    ring = p.stages * p.copies * p.strip * 2 * p.rows * keys.dtype.itemsize
    out = (1 + winners) * 4 * 2 * p.rows * p.questions
    assert ring + strips * p.pieces * p.columns * itemsize + out <= 227 * 1024 - 4096


@pytest.mark.parametrize(
    ("kind", "shape", "dtypes", "reason"),
    [
        ("NVIDIA H100 80GB HBM3", 64, ("bfloat16", "bfloat16"), None),
        ("NVIDIA GH200 480GB", 64, ("bfloat16", "bfloat16"), None),
        ("NVIDIA A100-SXM4-80GB", 64, ("bfloat16", "bfloat16"), "needs a Hopper GPU"),
        ("NVIDIA B200", 64, ("bfloat16", "bfloat16"), "this is 'NVIDIA B200'"),
        ("NVIDIA H200", 64, ("bfloat16", "float16"), "keys must be float32, bfloat16 or int8, got float16"),
        ("NVIDIA H200", 64, ("float8_e4m3fn", "bfloat16"), "got float8_e4m3fn"),
        ("NVIDIA H200", 12, ("bfloat16", "bfloat16"), "a multiple of 16 bytes for tensor copies, got M 12 of bfloat16"),
        ("NVIDIA H200", 72, ("bfloat16", "bfloat16"), "multiple of 64 or 32 or 16 for bfloat16 keys and bfloat16"),
        (
            "NVIDIA H200",
            144,
            ("int8", "int8"),
            "M must be a multiple of 128 or 64 for int8 keys and int8 queries, got 144",
        ),
    ],
)
def test_says_what_it_cannot_run(kind, shape, dtypes, reason):
    query, keys = jax.ShapeDtypeStruct((1, 2, shape), dtypes[0]), jax.ShapeDtypeStruct((9, shape), dtypes[1])
    with device(kind):
        got = gpu.unsupported(query=query, keys=keys)
    assert got is None if reason is None else reason in got


def test_by_name_it_never_falls_back():
    query, keys = jnp.ones((1, 2, 12), jnp.bfloat16), jnp.ones((5, 12), jnp.bfloat16)
    with interpreted(), pytest.raises(NotImplementedError, match="the 'gpu' kernel cannot run this: rows of keys"):
        chunk_scores(query, keys, implementation="gpu")
    assert "needs a Hopper GPU" in gpu.unsupported(query=query, keys=keys)  # this host, not interpreted
