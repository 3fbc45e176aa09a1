"""`gather_attention` on Hopper: the kernels interpreted, against a loop in float64; lowered for CUDA at full size."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # no public word for "were there races"

from pallas_kernels.gather_attention import gpu
from pallas_kernels.gather_attention.reference import Operands

C = 136
STARTS = [[3, 131, 40], [100, 7, 0]]
LENGTHS = [[70, 5, 0], [36, 1, 136]]
TOLERANCE = {"bfloat16": 2e-2, "float32": 3e-6, "int8": 2e-2}


def make(dtype="bfloat16", *, t=3, s=5, h=4, kv=2, d=16, starts=STARTS, lengths=LENGTHS, biased=True, seed=0, **where):
    """Operands; `dtype` int8 is an int8 bank with bfloat16 tokens. Chunks that no range has are NaN."""
    rng = np.random.default_rng(seed)
    b, k = np.shape(starts)
    floats = jnp.float32 if dtype == "float32" else jnp.bfloat16
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), floats)  # noqa: E731
    selected = np.zeros(C, bool)
    for start, length in zip(np.ravel(starts), np.ravel(lengths), strict=True):
        selected[int(start) : int(start) + int(length)] = True
    bank, scales = [], [None, None]
    for i in range(2):
        content = jnp.where(selected[:, None, None], draw(C, kv, d), jnp.nan)
        if dtype == "int8":
            content = jnp.asarray(rng.integers(-127, 128, (C, kv, d)), jnp.int8)
            scales[i] = jnp.asarray(np.where(selected, rng.uniform(0.005, 0.02, (kv, C)), np.nan), jnp.float32)
        bank.append(content)
    mask = jnp.asarray(where.get("mask", rng.random((b, s)) < 0.8))
    own = [jnp.where(mask[..., None, None], draw(b, s, kv, d), jnp.nan) for _ in range(2)]
    return Operands(
        q=draw(b, t, h, d),
        k=own[0],
        v=own[1],
        bank_k=bank[0],
        bank_v=bank[1],
        bank_k_scale=scales[0],
        bank_v_scale=scales[1],
        starts=jnp.asarray(starts, jnp.int32).reshape(b, k),
        lengths=jnp.asarray(lengths, jnp.int32).reshape(b, k),
        bias=jnp.asarray(rng.normal(size=(b, k, h)), jnp.float32) if biased else None,
        mask=mask,
    )


def columns(x, b, h):
    """What each query of head h of question b may see: keys, values and biases, the own tokens last; float64."""
    kv = h // (x["q"].shape[2] // x["k"].shape[2])
    keys, values, biases = [], [], []
    for j, (start, length) in enumerate(zip(x["starts"][b], x["lengths"][b], strict=True)):
        for c in range(start, start + length):
            parts = [x["bank_k"][c, kv], x["bank_v"][c, kv]]
            if x["bank_k_scale"] is not None:
                parts = [parts[0] * x["bank_k_scale"][kv, c], parts[1] * x["bank_v_scale"][kv, c]]
            keys.append(parts[0])
            values.append(parts[1])
            biases.append(0.0 if x["bias"] is None else x["bias"][b, j, h])
    return keys, values, biases, kv


def loop(operands):
    """Out and lse by the definition, one head of one token at a time, in float64."""
    x = {n: None if a is None else np.asarray(a).astype(np.float64) for n, a in operands._asdict().items()}
    x |= {n: np.asarray(getattr(operands, n)) for n in ("starts", "lengths", "mask")}
    t, s = x["q"].shape[1], x["k"].shape[1]
    out, lse = np.zeros(x["q"].shape), np.full(x["q"].shape[:3], -1e30)
    for b, h in np.ndindex(x["q"].shape[0], x["q"].shape[2]):
        keys, values, biases, kv = columns(x, b, h)
        for i in range(t):
            own = [c for c in range(s - t + i + 1) if x["mask"][b, c]]
            all_keys = [*keys, *(x["k"][b, c, kv] for c in own)]
            if all_keys:
                logits = np.stack(all_keys) @ x["q"][b, i, h] * x["q"].shape[3] ** -0.5
                logits += np.array([*biases, *[0.0] * len(own)])
                top = logits.max()
                weights = np.exp(logits - top)
                all_values = np.stack([*values, *(x["v"][b, c, kv] for c in own)])
                out[b, i, h] = weights @ all_values / weights.sum()
                lse[b, i, h] = top + np.log(weights.sum())
    return out, lse


def interpret(fn, *args, **params):
    """fn(*args) with its kernels interpreted; they are traced anew, and no race may be found if asked for."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**params)):
        result = jax.block_until_ready(jax.jit(lambda *args: fn(*args))(*args))
    if params.get("detect_races"):
        assert not interpret_pallas_call.get_races().races_found
    return result


forward = functools.partial(gpu.forward, max_length=C)

# What is the matter with each: where ranges lie, and how tokens, heads and head dims meet the tiles.
FORWARD = {
    "ranges that overlap, end at C, hold the whole bank or nothing": {},
    "float32": dict(dtype="float32"),
    "int8": dict(dtype="int8", d=32),
    "one head a group": dict(h=3, kv=3, d=32),
    "four heads a group, a cache of two tiles": dict(h=4, kv=1, t=2, s=77, d=64),
    "more rows than a warpgroup has": dict(h=6, kv=2, t=23, s=30, starts=[[9]], lengths=[[12]]),
    "more rows than a block has, splits of one": dict(h=4, kv=1, t=35, s=70, starts=[[9]], lengths=[[64]]),
    "one token": dict(t=1, s=66),
    "no own tokens": dict(s=0),
    "no documents": dict(starts=np.zeros((2, 0)), lengths=np.zeros((2, 0)), biased=False),
    "no bias": dict(biased=False),
    "head dim 128": dict(d=128, h=2, kv=2, starts=[[5]], lengths=[[9]]),
}


@pytest.mark.parametrize("name", FORWARD)
def test_equals_a_loop_in_float64(name):
    operands = make(**FORWARD[name])
    assert gpu.unsupported(operands=operands) is None
    out, lse = interpret(forward, operands)
    want, want_lse = loop(operands)
    assert out.dtype == operands.q.dtype and lse.dtype == jnp.float32
    tolerance = TOLERANCE[FORWARD[name].get("dtype", "bfloat16")]
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=tolerance)
    np.testing.assert_allclose(lse, want_lse, atol=1e-3 if tolerance > 1e-3 else 3e-6)
