"""Correctness of the GPU kernels, case by case: against the plain form in float32, and against themselves.

An error counts as good while it is at most twice that of the plain form in the case's own dtype. Inputs hold NaN
wherever an operation must not look.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chunk_scores, gather_attention


@dataclasses.dataclass(frozen=True)
class Scores:
    """A case of `chunk_scores`; sizes as there. Gradients use small integers, whose products no order rounds."""

    name: str
    b: int
    t: int
    c: int
    m: int
    query: str = "bfloat16"
    keys: str = "bfloat16"
    mask: bool = True
    gradients: bool = False


@dataclasses.dataclass(frozen=True)
class Attention:
    """A case of `gather_attention`; sizes as there, `longest` chunks to a document."""

    name: str
    b: int
    t: int
    s: int
    h: int
    kv: int
    d: int
    c: int
    k: int
    longest: int
    dtype: str = "bfloat16"
    bank: str = "bfloat16"
    bias: bool = False
    mask: bool = True
    gradients: bool = False
    ranges: str = "mixed"  # or "none": nothing selected; "overlapping": one document twice; "outside": cut by the bank


CASES: tuple[Scores | Attention, ...] = (
    Scores("scores: small", 2, 5, 130, 64),
    Attention("attention: small", 2, 5, 7, 4, 2, 32, 128, 3, 9),
    Scores("scores: small, gradients", 2, 5, 130, 64, gradients=True),
    Attention("attention: small, gradients", 2, 5, 7, 4, 2, 32, 128, 3, 9, bias=True, gradients=True),
    Scores("scores: one token", 1, 1, 4099, 128, mask=False),
    Scores("scores: many questions of one token", 67, 1, 1031, 256),
    Scores("scores: ragged", 3, 13, 389, 192, gradients=True),
    Scores("scores: float32", 2, 17, 1031, 256, "float32", "float32"),
    Scores("scores: float32, gradients", 2, 17, 1031, 256, "float32", "float32", gradients=True),
    Scores("scores: float32 query, bfloat16 keys", 2, 17, 1031, 256, "float32", "bfloat16"),
    Scores("scores: int8 keys", 2, 17, 1031, 256, "bfloat16", "int8"),
    Scores("scores: int8 both", 2, 17, 1031, 256, "int8", "int8"),
    Scores("scores: one question, real size", 1, 64, 262_147, 1024),
    Scores("scores: one token, real size", 1, 1, 262_147, 1024),
    Scores("scores: eight questions, real size", 8, 64, 65_536, 1024),
    Scores("scores: int8 keys, real size", 1, 64, 262_147, 1024, "bfloat16", "int8"),
    Scores("scores: int8 both, real size", 1, 64, 262_147, 1024, "int8", "int8"),
    Scores("scores: training size, gradients", 48, 64, 8192, 1024, gradients=True),
    Attention("attention: nothing selected", 2, 5, 7, 4, 2, 64, 128, 3, 9, ranges="none", gradients=True),
    Attention("attention: no own tokens", 2, 5, 0, 4, 2, 64, 128, 3, 9),
    Attention("attention: overlapping ranges", 2, 5, 7, 4, 2, 64, 128, 4, 9, ranges="overlapping", gradients=True),
    Attention("attention: ranges cut by the bank", 2, 5, 7, 4, 2, 64, 128, 4, 9, ranges="outside"),
    Attention("attention: decoding", 3, 1, 41, 8, 2, 128, 512, 4, 70, bias=True),
    Attention("attention: decoding, gradients", 3, 1, 41, 8, 2, 128, 512, 4, 70, gradients=True),
    Attention("attention: float32", 2, 9, 21, 8, 2, 64, 512, 4, 33, "float32", "float32", bias=True),
    Attention("attention: float32, gradients", 2, 9, 21, 8, 2, 64, 512, 4, 33, "float32", "float32", gradients=True),
    Attention("attention: int8 bank", 2, 9, 21, 8, 2, 128, 512, 4, 33, bank="int8", bias=True),
    Attention("attention: one head a group", 2, 9, 21, 4, 4, 128, 512, 4, 33, gradients=True),
    Attention("attention: real size", 2, 64, 131, 32, 8, 128, 65_536, 16, 128),
    Attention("attention: decoding, real size", 8, 1, 259, 32, 8, 128, 65_536, 16, 128),
    Attention("attention: int8 bank, real size", 2, 64, 131, 32, 8, 128, 65_536, 16, 128, bank="int8"),
    Attention("attention: training size, gradients", 8, 64, 67, 32, 8, 128, 8192, 16, 64, bias=True, gradients=True),
)


def _random(rng, shape, dtype, integers=False):
    if dtype == "int8":
        return jnp.asarray(rng.integers(-127, 128, shape, np.int8))
    drawn = rng.integers(-3, 4, shape).astype(np.float32) if integers else rng.standard_normal(shape, np.float32)
    return jnp.asarray(drawn, dtype)


def _scores_inputs(case: Scores):
    rng = np.random.default_rng(list(case.name.encode()))
    mask = rng.random((case.b, case.t)) > 0.25 if case.mask else np.ones((case.b, case.t), bool)
    mask[:, 0] = True
    query = _random(rng, (case.b, case.t, case.m), case.query, case.gradients)
    given = dict(query=query if case.query == "int8" else jnp.where(mask[..., None], query, jnp.nan))
    given["keys"] = _random(rng, (case.c, case.m), case.keys, case.gradients)
    given["query_mask"] = jnp.asarray(mask)
    if case.query == "int8":
        given["query_scale"] = jnp.asarray(rng.uniform(0.01, 0.02, mask.shape), jnp.float32)
    if case.keys == "int8":
        given["key_scale"] = jnp.asarray(rng.uniform(0.01, 0.02, case.c), jnp.float32)
    return given, [_random(rng, (case.b, case.c), "float32")]


def ranges_of(rng, case: Attention) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths [B, k] of a case's documents."""
    lengths = rng.integers(0, case.longest + 1, (case.b, case.k))
    starts = rng.integers(0, case.c - case.longest, (case.b, case.k))
    if case.ranges == "none":
        lengths[:] = 0
    if case.ranges == "overlapping":
        starts[:, 1], lengths[:, :2] = starts[:, 0] + 2, case.longest
    if case.ranges == "outside":
        starts[:, 0], starts[:, 1], lengths[:, :2] = case.c - 3, -2, case.longest
    return starts.astype(np.int32), lengths.astype(np.int32)


def _attention_inputs(case: Attention):
    rng = np.random.default_rng(list(case.name.encode()))
    starts, lengths = ranges_of(rng, case)
    mask = rng.random((case.b, case.s)) > 0.25 if case.mask else np.ones((case.b, case.s), bool)
    own = lambda: jnp.where(mask[..., None, None], _random(rng, (case.b, case.s, case.kv, case.d), case.dtype), jnp.nan)  # noqa: E731
    used = np.zeros(case.c, bool)
    for start, length in zip(starts.flat, lengths.flat, strict=True):
        used[max(start, 0) : max(start + length, 0)] = True
    bank = lambda: _random(rng, (case.c, case.kv, case.d), case.bank)  # noqa: E731
    poisoned = lambda: bank() if case.bank == "int8" else jnp.where(used[:, None, None], bank(), jnp.nan)  # noqa: E731
    given = dict(q=_random(rng, (case.b, case.t, case.h, case.d), case.dtype), k=own(), v=own())
    given |= dict(bank_k=poisoned(), bank_v=poisoned(), starts=jnp.asarray(starts), lengths=jnp.asarray(lengths))
    if case.bank == "int8":
        for name in ("bank_k_scale", "bank_v_scale"):
            scale = jnp.asarray(rng.uniform(0.005, 0.02, (case.kv, case.c)), jnp.float32)
            given[name] = jnp.where(used[None], scale, jnp.nan)
    if case.bias:
        given["bias"] = _random(rng, (case.b, case.k, case.h), "float32")
    given["mask"] = jnp.asarray(mask)
    rows = (case.b, case.t, case.h)
    return given, [_random(rng, (*rows, case.d), "float32"), _random(rng, rows, "float32")]


def inputs(case: Scores | Attention) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """Arguments by name, and a float32 cotangent for every result."""
    return _scores_inputs(case) if isinstance(case, Scores) else _attention_inputs(case)


def run(case: Scores | Attention, given: dict, cotangents: list, implementation: str) -> dict[str, jax.Array]:
    """Results by name, and the gradients of all float operands that have one if the case asks for them."""
    if isinstance(case, Scores):
        op = lambda **kw: (chunk_scores(**kw, implementation=implementation),)  # noqa: E731
        names, differentiable = ("scores",), ("query", "keys")
    else:
        op = lambda **kw: gather_attention(**kw, max_length=case.longest, implementation=implementation)  # noqa: E731
        names, differentiable = ("out", "lse"), ("q", "k", "v", "bank_k", "bank_v", "bias")

    @jax.jit
    def results(given, cotangents):
        if not case.gradients:
            return dict(zip(names, op(**given), strict=True))
        floats = {n: x for n, x in given.items() if n in differentiable and jnp.issubdtype(x.dtype, jnp.floating)}
        outs, pull_back = jax.vjp(lambda floats: op(**(given | floats)), floats)
        (gradients,) = pull_back(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outs, strict=True)))
        return dict(zip(names, outs, strict=True)) | {f"gradient of {n}": g for n, g in gradients.items()}

    return results(given, cotangents)


def in_float32(given: dict) -> dict:
    """The same arguments, float operands as float32, integers and their scales multiplied out."""
    wide = {n: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for n, x in given.items()}
    scales = {"query": "query_scale", "keys": "key_scale", "bank_k": "bank_k_scale", "bank_v": "bank_v_scale"}
    for name, scale in scales.items():
        if scale in wide:
            by = wide.pop(scale)
            wide[name] = wide[name].astype(jnp.float32) * (by.T if name.startswith("bank") else by)[..., None]
    return wide


def check(case: Scores | Attention, implementation: str = "gpu") -> dict:
    """Largest errors of the implementation and of the plain form, result by result, and whether the case passes."""
    given, cotangents = inputs(case)
    got = jax.device_get(run(case, given, cotangents, implementation))
    again = jax.device_get(run(case, given, cotangents, implementation))
    given = {n: jnp.nan_to_num(x, nan=0.0) if jnp.issubdtype(x.dtype, jnp.floating) else x for n, x in given.items()}
    plain = jax.device_get(run(case, given, cotangents, "xla"))
    # On the host, whose float32 products are float32 and are summed in another order.
    host = jax.devices("cpu")[0]
    with jax.default_matmul_precision("highest"), jax.default_device(host):
        wide, cotangents = jax.device_put((in_float32(given), cotangents), host)
        want = jax.device_get(run(case, wide, cotangents, "xla"))
    errors, passed = {}, True
    for name, value in want.items():
        ours, theirs, best = (np.asarray(x[name], np.float32) for x in (got, plain, want))
        error, naive = (float(np.max(np.abs(x - best), initial=0.0)) for x in (ours, theirs))
        size = float(np.max(np.abs(best), where=np.abs(best) < 1e29, initial=0.0))
        good = error <= 2 * naive + 1e-6 * max(1.0, size)  # NaN is not
        equal = got[name].tobytes() == again[name].tobytes()
        errors[name] = {"error": error, "plain": naive, "largest": size, "good": bool(good), "bit_equal": equal}
        passed &= bool(good) and equal and value.shape == got[name].shape
    return {"passed": passed, "results": errors}
