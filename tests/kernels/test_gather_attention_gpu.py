"""`gather_attention` on Hopper: the kernels interpreted, against a loop in float64; lowered for CUDA at full size."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gather_attention import gpu, gpu_config
from pallas_kernels.gather_attention.reference import Operands
from tests.kernels.implementations import quick

C = 139
STARTS = [[3, 131, 40], [100, 7, 0]]
LENGTHS = [[70, 5, 0], [39, 1, 139]]
ONE = dict(starts=[[9]], lengths=[[64]])
TOLERANCE = {"bfloat16": 1e-2, "float32": 3e-6, "int8": 1e-2}


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


def oracle(operands):
    """Out and lse by the definition over every column at once, in float64; a document is a copy of the bank."""
    x = {n: None if a is None else jnp.asarray(a).astype(jnp.float64) for n, a in operands._asdict().items()}
    (b, t, h, d), (s, kv) = operands.q.shape, operands.k.shape[1:3]
    chunk = np.arange(C)
    starts, lengths = (np.asarray(n)[..., None] for n in (operands.starts, operands.lengths))
    inside = (chunk >= starts) & (chunk < starts + lengths)  # [B, k, C]
    causal = np.arange(s) <= np.arange(t)[:, None] + (s - t)
    seen = [
        np.broadcast_to(inside.reshape(b, 1, -1), (b, t, inside[0].size)),
        causal[None] & np.asarray(operands.mask)[:, None],
    ]
    seen = jnp.concatenate(seen, axis=2)[:, None]  # [B, 1, T, k C + S]

    def every(name):
        content, own = x[f"bank_{name}"], jnp.where(operands.mask[..., None, None], x[name], 0)
        if operands.bank_k.dtype == jnp.int8:  # content is what the plain form rounds it to
            content = (content * x[f"bank_{name}_scale"].T[..., None]).astype(jnp.bfloat16).astype(jnp.float64)
        content = jnp.where(inside.any((0, 1))[:, None, None], content, 0)
        content = jnp.broadcast_to(content, (b, inside.shape[1], *content.shape)).reshape(b, -1, kv, d)
        return jnp.repeat(jnp.concatenate([content, own], axis=1), h // kv, axis=2)

    logits = jnp.einsum("bthd,bshd->bhts", x["q"], every("k")) * d**-0.5
    if x["bias"] is not None:
        spread = jnp.repeat(x["bias"], C, axis=1).swapaxes(1, 2)[:, :, None]
        logits = logits + jnp.pad(spread, ((0, 0), (0, 0), (0, 0), (0, s)))
    weights = jnp.where(seen, jnp.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1)
    out = jnp.einsum("bhts,bshd->bthd", weights / safe, every("v"))
    return out, jnp.where(total > 0, jnp.log(safe), -1e30)[..., 0].swapaxes(1, 2)


def interpret(fn, *args, **params):
    """fn(*args) with its kernels interpreted, and traced anew; a race raises."""
    params = dict(detect_races=True) | params
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**params)):
        return jax.block_until_ready(jax.jit(lambda *args: fn(*args))(*args))


def cotangents(operands):
    """Random ones of out and of lse."""
    rng = np.random.default_rng(1)
    q = operands.q
    return jnp.asarray(rng.normal(size=q.shape), q.dtype), jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32)


def both(operands, cotangents):
    """(outs, gradients) of the kernels, and of the oracle in float64."""

    def kernels(operands, grad_out, grad_lse):
        outs = gpu.forward(operands, max_length=C)
        return outs, gpu.backward(operands, *outs, grad_out, grad_lse, max_length=C)

    got = interpret(kernels, operands, *cotangents)
    floats = {n: a for n, a in operands._asdict().items() if a is not None and n in gpu.Gradients._fields}
    floats = {n: a for n, a in floats.items() if a.dtype != jnp.int8}
    with jax.enable_x64():
        wide = {n: jnp.asarray(a).astype(jnp.float64) for n, a in floats.items()}
        grads = tuple(c.astype(jnp.float64) for c in cotangents)

        @jax.jit
        def pulled(wide, grads):
            outs, pull = jax.vjp(lambda wide: oracle(operands._replace(**wide)), wide)
            return outs, pull(grads)[0]

        want = jax.device_get(pulled(wide, grads))
    return got, want


def near(got, want, tolerance, name):
    scale = max(1.0, np.abs(want).max(initial=0))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance * scale, err_msg=name)


# What is the matter with each: where ranges lie, and how tokens, heads and head dims meet the tiles.
CASES = {
    "ranges that overlap, end at C, hold the whole bank or nothing": {},
    "float32": dict(dtype="float32", starts=[[70]], lengths=[[69]], h=2, kv=1),
    "int8, more tiles in a block than in flight": dict(dtype="int8", d=32, h=2, kv=1),
    "more rows than a block, more own tokens than a tile": dict(h=4, kv=1, t=70, s=77, d=64, biased=False, **ONE),
    "one token, one head a group": dict(t=1, s=66, h=2, kv=2, starts=[[9, 0]], lengths=[[12, 0]]),
    "no own tokens": dict(s=0, h=1, kv=1, d=128, starts=[[5]], lengths=[[9]]),
    "no documents": dict(starts=np.zeros((2, 0)), lengths=np.zeros((2, 0)), biased=False),
}


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    """Few splits, so that there are few blocks to interpret and each has many tiles."""
    monkeypatch.setattr(gpu_config, "MULTIPROCESSORS", 6)


@pytest.mark.parametrize("name", quick(CASES, "float32", "no own tokens"))
def test_equals_the_definition_in_float64(name, monkeypatch):
    if "in flight" in name:
        monkeypatch.setattr(gpu_config, "MULTIPROCESSORS", 1)
    operands = make(**CASES[name])
    assert gpu.unsupported(operands=operands) is None
    tolerance = TOLERANCE[CASES[name].get("dtype", "bfloat16")]
    (outs, grads), (want, want_grads) = both(operands, cotangents(operands))
    for got, wanted, which in zip(outs, want, ("out", "lse"), strict=True):
        near(got, wanted, tolerance if which == "out" else min(tolerance, 1e-4), which)
    for which, got in grads._asdict().items():
        if got is None:
            assert which not in want_grads
        else:
            assert got.dtype == getattr(operands, which).dtype
            # The bias sums what is left of numbers that cancel, one of them from `out` as it was rounded.
            near(got, want_grads[which], 5 * tolerance if which == "bias" else tolerance, which)


def test_nothing_to_attend_to():
    """Question 1 has no document and no token that exists but its last."""
    mask = np.array([[True] * 3, [False, False, True]])
    operands = make(s=3, h=1, kv=1, starts=[[9], [139]], lengths=[[3], [0]], mask=mask)
    (outs, grads), (want, want_grads) = both(operands, cotangents(operands))
    out, lse = outs
    assert not np.any(out[1, :2]) and np.all(lse[1, :2] == np.float32(-1e30))
    near(out, want[0], 1e-2, "out")
    assert not np.any(grads.q[1, :2]) and not np.any(grads.k[1, :2])
    assert all(np.isfinite(g.astype(jnp.float32)).all() for g in jax.tree.leaves(grads))
    near(grads.q, want_grads["q"], 1e-2, "q")


def test_nothing_at_all_needs_no_kernel():
    operands = make(s=0, starts=np.zeros((2, 0)), lengths=np.zeros((2, 0)), biased=False)
    outs = gpu.forward(operands, max_length=C)
    assert not np.any(outs[0]) and np.all(outs[1] == np.float32(-1e30))
    grads = gpu.backward(operands, *outs, *cotangents(operands), max_length=C)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_two_runs_agree_bit_by_bit():
    operands = make(h=1, kv=1, s=0)  # ranges overlap within a question and between the two

    def gradients(operands, out, lse, *cotangents):
        return gpu.backward(operands, out, lse, *cotangents, max_length=C)

    outs = (operands.q, operands.q[..., 0].astype(jnp.float32) + 6)
    first, second = (interpret(gradients, operands, *outs, *cotangents(operands), detect_races=False) for _ in "ab")
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
