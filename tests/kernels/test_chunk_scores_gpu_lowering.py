"""`chunk_scores` on Hopper without a GPU: lowered for CUDA at full size; block sizes; what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels import chunk_scores
from pallas_kernels.chunk_scores import gpu, gpu_config, gpu_terms

FULL = 1_562_500  # 100M tokens; no multiple of 8, let alone of a tile


def device(kind="NVIDIA H200"):
    described = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=described))


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


# What may touch a bank on its way to a kernel: nothing that copies it.
FREE = ("func.func", "call @", "custom_call @mosaic_gpu", "broadcast_in_dim", "return", "while", "case")


def kernels(program, bank, *args):
    """How many kernels a program holds once lowered for CUDA, in which nothing copies arrays of shape `bank`."""
    with device():
        text = jax.jit(program).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    name = "tensor<" + "x".join(map(str, bank)) + "x"
    touching = [line for line in text.splitlines() if name in line]
    assert touching and all(any(op in line for op in FREE) for line in touching)
    return text.count("custom_call @mosaic_gpu")


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

    assert kernels(lambda q, k, s: scores(q, k, **s), (c, m), query, keys, scales) == 1
    if floats:
        assert kernels(trained, (c, m), query, keys, scales) == 1 + len(floats)


def test_a_scan_over_layers_copies_none():
    layers, m = 18, 1024
    bank = jax.ShapeDtypeStruct((layers, FULL, m), jnp.bfloat16)

    def route(bank, query):
        scores = lambda layer: chunk_scores(query, bank, layer=layer, implementation="gpu")  # noqa: E731
        return jax.lax.map(lambda layer: jax.lax.top_k(scores(layer), 16), jnp.arange(layers))

    assert kernels(route, bank.shape, bank, jax.ShapeDtypeStruct((1, 64, m), jnp.bfloat16)) == 1


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
    with (
        plgpu.force_gpu_interpret_mode(),
        pytest.raises(NotImplementedError, match="the 'gpu' kernel cannot run this: rows of keys"),
    ):
        chunk_scores(query, keys, implementation="gpu")
    assert "needs a Hopper GPU" in gpu.unsupported(query=query, keys=keys)  # this host, not interpreted


@settings(max_examples=30)
@given(st.lists(st.floats(2**-80, 2**80, width=32), min_size=1, max_size=9))
def test_a_float32_is_the_sum_of_its_terms(values):
    x = np.array(values + [-v for v in values], np.float32)
    terms = jax.jit(gpu_terms.split)(x)
    assert [term.dtype for term in terms] == [jnp.bfloat16] * 3
    np.testing.assert_array_equal(sum(np.asarray(term.astype(jnp.float32), np.float64) for term in terms), x)
