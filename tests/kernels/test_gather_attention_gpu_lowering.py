"""`gather_attention` on Hopper: lowered for CUDA at full size; its choice of sizes, of owners, of what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import gather_attention
from pallas_kernels.gather_attention import gpu, gpu_config, gpu_owners
from pallas_kernels.gather_attention.reference import Operands


@settings(max_examples=50)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 60)), min_size=9, max_size=9),
    rows=st.sampled_from([8, 64, 128]),
)
def test_every_owner_meets_every_range_that_touches_it(ranges, rows):
    starts, lengths = np.array(ranges, np.int32).reshape(1, -1, 2).transpose(2, 0, 1)
    lengths = np.minimum(lengths, 100 - starts)
    items, bounds = (np.asarray(x) for x in gpu_owners.candidates(jnp.asarray(starts), jnp.asarray(lengths), 100, rows))
    items, bounds = items.reshape(4, -1), bounds.reshape(2, -1)
    for block, (low, high) in enumerate(bounds.T):
        met = [items[3, r] for r in range(low, high) if items[0, r] < (block + 1) * rows and items[1, r] > block * rows]
        wanted = (lengths[0] > 0) & (starts[0] < (block + 1) * rows) & (starts[0] + lengths[0] > block * rows)
        assert sorted(met) == list(np.flatnonzero(wanted))


@given(blocks=st.integers(1, 2000), tiles=st.integers(0, 300))
def test_splits_have_tiles_and_fill_the_device_where_they_can(blocks, tiles):
    splits = gpu_config.splits(blocks, tiles)
    assert 1 <= splits <= max(1, tiles)
    if tiles >= gpu_config.MULTIPROCESSORS:
        assert blocks * splits / (-(-blocks * splits // 132) * 132) >= 0.9


HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
# The 4B model's prefill, in training too, and decode; the tiny model. The last number: kernels of both directions.
SIZES = {
    "prefill": (dict(b=4, t=512, s=512), 4),
    "prefill, int8": (dict(b=1, t=64, s=67, bank="int8"), 3),
    "decode": (dict(b=1, t=1, s=4096), None),
    "decode, int8": (dict(b=64, t=1, s=4096, bank="int8"), None),
    "decode, int8, small heads": (dict(b=2, t=1, s=64, d=48, bank="int8"), None),
    "tiny, float32": (dict(b=4, t=64, s=65, h=4, kv=2, d=32, c=1024, dtype="float32"), 4),
}


def abstract(*, b, t, s, h=32, kv=8, d=128, c=200_000, documents=16, dtype="bfloat16", bank=None):
    shape = jax.ShapeDtypeStruct
    scale = shape((kv, c), jnp.float32) if bank == "int8" else None
    return Operands(
        q=shape((b, t, h, d), dtype),
        k=shape((b, s, kv, d), dtype),
        v=shape((b, s, kv, d), dtype),
        bank_k=shape((c, kv, d), bank or dtype),
        bank_v=shape((c, kv, d), bank or dtype),
        bank_k_scale=scale,
        bank_v_scale=scale,
        starts=shape((b, documents), jnp.int32),
        lengths=shape((b, documents), jnp.int32),
        bias=shape((b, documents, h), jnp.float32),
        mask=shape((b, s), jnp.bool_),
    )


@pytest.mark.parametrize("name", SIZES)
def test_lowers_for_cuda_at_full_size(name):
    """Through the public function: a mesh of H200s in scope chooses the kernel by itself."""
    sizes, kernels = SIZES[name]

    def attend(operands):
        rest = operands._asdict()
        q, k, v = (rest.pop(n) for n in "qkv")
        return gather_attention(q, k, v, **rest, max_length=256)

    def gradients(operands):
        return jax.grad(lambda operands: attend(operands)[0].astype(jnp.float32).sum(), allow_int=True)(operands)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=HOPPER)):
        traced = jax.jit(gradients if kernels else attend).trace(abstract(**sizes))
        module = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert module.count("mosaic_gpu_v2") == (kernels or 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype="float16"), "q, k and v must be bfloat16 or float32"),
        (dict(bank="float8_e4m3fn"), "the bank must be"),
        (dict(d=24), "multiple of 16 up to 128"),
        (dict(d=160), "multiple of 16 up to 128"),
        (dict(s=65_536), "more than it plans for"),
        (dict(c=200_001), "holds 200001 chunks"),
        (dict(dtype="float32"), "shared memory"),
    ],
)
def test_says_what_it_cannot_run(change, reason):
    sizes = dict(b=1, t=2, s=3) | change
    assert reason in gpu.unsupported(operands=abstract(**sizes))
    assert gpu.unsupported(operands=abstract(b=1, t=2, s=3)) is None


@pytest.mark.parametrize(
    ("kind", "runs"), [("NVIDIA H200", True), ("NVIDIA GH200 480GB", True), ("NVIDIA A100", False)]
)
def test_runs_on_hopper_alone(kind, runs):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        reason = gpu.unsupported(operands=abstract(b=1, t=2, s=3))
    assert reason is None if runs else "written for Hopper" in reason and kind in reason
