"""`gather_attention` against a softmax in a loop, its gradients against a dense form; merging, leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import gather_attention

B, T, C, D, DOCS, LONGEST = 2, 3, 13, 5, 3, 4
# H, K, S: grouped, multi-head and multi-query attention, with and without a prefix.
LAYOUTS = [(6, 2, 5), (3, 3, 3), (4, 1, 7)]
seeds = st.integers(0, 2**31)
attend = jax.jit(gather_attention, static_argnames=("max_length", "implementation"))


@st.composite
def ranges(draw):
    """starts, lengths [B, k]: any ranges within the bank, those of two questions may overlap."""
    lengths = draw(st.lists(st.integers(0, LONGEST), min_size=B * DOCS, max_size=B * DOCS))
    starts = [draw(st.integers(0, C - n)) for n in lengths]
    return np.array(starts, np.int32).reshape(B, DOCS), np.array(lengths, np.int32).reshape(B, DOCS)


def bits(*shape):
    size = int(np.prod(shape))
    return st.lists(st.booleans(), min_size=size, max_size=size).map(lambda m: np.array(m).reshape(shape))


def floats(seed, layout):
    h, kv, s = layout
    rng = np.random.default_rng(seed)
    own, bank = (B, s, kv, D), (C, kv, D)
    shapes = dict(q=(B, T, h, D), k=own, v=own, bank_k=bank, bank_v=bank, bias=(B, DOCS, h))
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def loop(q, k, v, bank_k, bank_v, starts, lengths, bias, mask):
    """The definition in float64, one softmax of one head of one token at a time."""
    s, group = k.shape[1], q.shape[2] // k.shape[2]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -1e30)
    for b, t, h in np.ndindex(*q.shape[:3]):
        logits, values, query = [], [], q[b, t, h].astype(np.float64) / np.sqrt(q.shape[3])
        for d in range(starts.shape[1]):
            for c in range(starts[b, d], starts[b, d] + lengths[b, d]):
                logits.append(query @ bank_k[c, h // group] + bias[b, d, h])
                values.append(bank_v[c, h // group])
        for i in range(s - q.shape[1] + t + 1):
            if mask[b, i]:
                logits.append(query @ k[b, i, h // group])
                values.append(v[b, i, h // group])
        if logits:
            weights = np.exp(logits)
            out[b, t, h] = weights @ np.array(values) / weights.sum()
            lse[b, t, h] = np.log(weights.sum())
    return out, lse


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20)
@given(seed=seeds, where=ranges(), data=st.data())
def test_equals_one_softmax_written_as_a_loop(layout, seed, where, data):
    starts, lengths = where
    x, mask = floats(seed, layout), data.draw(bits(B, layout[2]))
    out, lse = attend(**x, starts=starts, lengths=lengths, mask=mask, max_length=LONGEST)
    assert out.dtype == lse.dtype == jnp.float32
    want, want_lse = loop(**x, starts=starts, lengths=lengths, mask=mask)
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=2e-5)


def test_large_logits_do_not_overflow():
    x = floats(5, LAYOUTS[0])
    x["q"] *= 100
    starts, lengths = some_documents(5)
    args = dict(**x, starts=starts, lengths=lengths, mask=np.ones((B, 5), bool))
    out, lse = attend(**args, max_length=LONGEST)
    want, want_lse = loop(**args)
    assert want_lse.max() > 150  # exp of more than 88 overflows float32
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
    np.testing.assert_allclose(out, want, atol=1e-3)


def some_documents(seed):
    """starts, lengths [B, k] of distinct documents of a bank: three, one and two nothings, in any order."""
    rng = np.random.default_rng(seed)
    sizes = np.array([4, 1, 3, 2, 3])
    chosen = np.stack([rng.permutation(5)[:DOCS] for _ in range(B)])
    starts, lengths = (np.cumsum(sizes) - sizes)[chosen], sizes[chosen]
    lengths[1, rng.permutation(DOCS)[:2]] = 0
    return starts.astype(np.int32), lengths.astype(np.int32)


def dense(q, k, v, bank_k, bank_v, bias, *, starts, lengths, mask):
    """The same over all C chunks with a mask: no gather, so its gradients are autodiff of something else."""
    s, group = k.shape[1], q.shape[2] // k.shape[2]
    place = jnp.arange(C)[None, None, :]
    inside = ((place >= starts[:, :, None]) & (place < (starts + lengths)[:, :, None])).astype(jnp.float32)
    causal = jnp.arange(s)[None, None, :] <= jnp.arange(T)[None, :, None] + s - T
    allowed = jnp.concatenate(
        [jnp.broadcast_to((inside.sum(1) > 0)[:, None], (B, T, C)), causal & mask[:, None, :]], axis=2
    )[:, :, None]
    spread = lambda bank: jnp.broadcast_to(jnp.repeat(bank, group, axis=1)[None], (B, C, *q.shape[2:]))  # noqa: E731
    keys = jnp.concatenate([spread(bank_k), jnp.repeat(k, group, axis=2)], axis=1)
    values = jnp.concatenate([spread(bank_v), jnp.repeat(v, group, axis=2)], axis=1)
    per_chunk = jnp.einsum("bdc,bdh->bhc", inside, bias)
    logits = jnp.einsum("bthd,bshd->bths", q, keys) / D**0.5
    logits = logits + jnp.pad(per_chunk, ((0, 0), (0, 0), (0, s)))[:, None]
    weights = jnp.where(allowed, jnp.exp(logits), 0.0)
    total = weights.sum(-1, keepdims=True)
    something = total > 0
    total = jnp.where(something, total, 1.0)
    out = jnp.einsum("bths,bshd->bthd", weights / total, values)
    return out, jnp.where(something, jnp.log(total), -1e30)[..., 0]


@functools.partial(jax.jit, static_argnames="form")
def vjp(form, x, cotangents, **where):
    function = dense if form == "dense" else functools.partial(gather_attention, max_length=LONGEST)
    value, pull = jax.vjp(lambda x: function(**x, **where), x)
    return value, pull(cotangents)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=10)
@given(seed=seeds, data=st.data())
def test_gradients_equal_those_of_a_dense_form(layout, seed, data):
    x, mask = floats(seed, layout), data.draw(bits(B, layout[2]))
    starts, lengths = some_documents(seed)
    rng = np.random.default_rng(seed + 1)
    cotangents = tuple(rng.normal(size=n).astype(np.float32) for n in (x["q"].shape, x["q"].shape[:3]))
    args = dict(starts=starts, lengths=lengths, mask=mask)
    want, want_grads = vjp("dense", x, cotangents, **args)
    got, grads = vjp("gather", x, cotangents, **args)
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)
    for name in x:
        np.testing.assert_allclose(grads[name], want_grads[name], atol=5e-5, err_msg=name)


@settings(max_examples=15)
@given(seed=seeds, where=ranges(), split=st.integers(0, DOCS))
def test_parts_merged_by_log_sum_exp_equal_one_softmax(seed, where, split):
    starts, lengths = where
    x = floats(seed, LAYOUTS[0])
    own = np.ones(x["k"].shape[:2], bool)
    out, lse = attend(**x, starts=starts, lengths=lengths, max_length=LONGEST)
    here = np.arange(DOCS) < split
    # The own tokens belong to one part alone, else they would count twice.
    parts = [
        attend(**x, starts=starts, lengths=np.where(here, lengths, 0), mask=own, max_length=LONGEST),
        attend(**x, starts=starts, lengths=np.where(here, 0, lengths), mask=~own, max_length=LONGEST),
    ]
    merged_lse = np.logaddexp(*(np.asarray(part[1], np.float64) for part in parts))
    merged = sum(part[0] * np.exp(part[1] - merged_lse)[..., None] for part in parts)
    np.testing.assert_allclose(merged, out, atol=1e-5)
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-5, atol=1e-5)


def test_a_token_with_nothing_to_attend_to():
    x = floats(0, LAYOUTS[0])
    starts, lengths = some_documents(0)
    lengths[1] = 0
    mask = np.ones((B, 5), bool)
    mask[1, :4] = False  # question 1 sees its last token alone, which only its last query reaches
    out, lse = attend(**x, starts=starts, lengths=lengths, mask=mask, max_length=LONGEST)
    assert (out[1, :2] == 0).all() and (lse[1, :2] == np.float32(-1e30)).all()
    np.testing.assert_allclose(out[1, 2], np.repeat(x["v"][1, 4], 3, axis=0), rtol=1e-6)
    cotangents = (np.ones(out.shape, np.float32), np.ones(lse.shape, np.float32))
    _, grads = vjp("gather", x, cotangents, starts=starts, lengths=lengths, mask=mask)
    assert all(np.isfinite(g).all() for g in grads.values()) and not np.any(grads["q"][1, :2])


@settings(max_examples=15)
@given(seed=seeds, where=ranges())
def test_chunks_that_are_not_selected_leave_no_trace(seed, where):
    """NaN in them reaches neither the output nor a gradient: capacity padding may hold anything."""
    starts, lengths = where
    x = floats(seed, LAYOUTS[0])
    selected = np.zeros(C, bool)
    for start, length in zip(starts.ravel(), lengths.ravel(), strict=True):
        selected[start : start + length] = True
    poisoned = dict(x)
    for name in ("bank_k", "bank_v"):
        poisoned[name] = np.where(selected[:, None, None], x[name], np.nan)
    args = dict(starts=starts, lengths=lengths, mask=np.ones((B, 5), bool))
    cotangents = (x["q"], x["q"][..., 0])
    for got, want in zip(
        jax.tree.leaves(vjp("gather", poisoned, cotangents, **args)),
        jax.tree.leaves(vjp("gather", x, cotangents, **args)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_a_document_of_one_question_leaves_no_trace_in_another():
    x = floats(4, LAYOUTS[0])
    starts, lengths = some_documents(4)
    starts[1], lengths[1] = 0, 0
    selected = np.arange(C) < lengths[0, 0]
    starts[0], lengths[0, 1:] = 0, 0
    poisoned = x | {n: np.where(selected[:, None, None], np.nan, x[n]) for n in ("bank_k", "bank_v")}
    out, _ = attend(**poisoned, starts=starts, lengths=lengths, max_length=LONGEST)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_max_length_bounds_what_is_gathered():
    x = floats(1, LAYOUTS[0])
    starts, lengths = some_documents(1)
    assert lengths.max() == 4
    args = dict(**x, starts=starts)
    for default, exact in zip(
        attend(**args, lengths=lengths), attend(**args, lengths=lengths, max_length=4), strict=True
    ):
        np.testing.assert_allclose(default, exact, atol=1e-6)
    cut = attend(**args, lengths=lengths, max_length=2)
    want = attend(**args, lengths=np.minimum(lengths, 2), max_length=4)
    np.testing.assert_allclose(cut[0], want[0], atol=1e-6)


@pytest.mark.parametrize("what", ["no bank", "no documents", "nothing selected"])
def test_without_documents_it_is_causal_attention(what):
    x = floats(2, LAYOUTS[0])
    starts, lengths = np.zeros((B, DOCS), np.int32), np.zeros((B, DOCS), np.int32)
    if what == "no bank":
        x |= {name: x[name][:0] for name in ("bank_k", "bank_v")}
    if what == "no documents":
        starts, lengths, x["bias"] = starts[:, :0], lengths[:, :0], x["bias"][:, :0]
    out, _ = attend(**x, starts=starts, lengths=lengths)
    causal = np.arange(5)[None, :] <= np.arange(T)[:, None] + 2
    want = jax.nn.dot_product_attention(*(jnp.asarray(x[name]) for name in "qkv"), mask=causal[None, None])
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_bfloat16_is_near_float32():
    x = floats(3, LAYOUTS[0])
    starts, lengths = some_documents(3)
    rounded = {n: a if n == "bias" else jnp.asarray(a, jnp.bfloat16) for n, a in x.items()}
    widened = {n: np.asarray(a, np.float32) for n, a in rounded.items()}
    out, lse = attend(**rounded, starts=starts, lengths=lengths, max_length=LONGEST)
    want, want_lse = attend(**widened, starts=starts, lengths=lengths, max_length=LONGEST)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)  # logits and their sum are float32
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.02)
