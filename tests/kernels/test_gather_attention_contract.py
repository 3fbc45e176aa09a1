"""What every implementation of `gather_attention` must do. Kernels are interpreted; poisoned memory, races, bounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, gather_attention, merge
from pallas_kernels.gather_attention.api import MASKED
from tests.kernels.implementations import IMPLEMENTATIONS, at_most_twice, matrix, running

# The GPU interpreter multiplies with numpy what a copy brings from beyond a range, before that is masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call, in the letters of the contract; `ranges` are (start, length) of every document."""

    b: int = 2
    t: int = 3
    s: int = 5
    h: int = 4
    kv: int = 2
    d: int = 16
    c: int = 152
    ranges: tuple = (((0, 7), (30, 0), (140, 10)), ((3, 21), (1, 2), (90, 37)))
    dtype: str = "float32"
    bank: str = "float32"
    bias: bool = True
    max_length: int | None = None


CASES = {
    "plain": Case(),
    "bfloat16": Case(dtype="bfloat16", bank="bfloat16", max_length=37),
    "int8": Case(dtype="bfloat16", bank="int8", d=32, c=307, ranges=(((300, 7), (120, 20)), ((129, 130), (0, 1)))),
    "int8, fp32 query": Case(bank="int8", d=32),
    "one head each": Case(h=3, kv=3, bias=False),
    "one shared head": Case(h=4, kv=1),
    "several blocks of queries": Case(b=1, t=140, s=141, h=4, kv=1, ranges=(((0, 40), (20, 40)),)),
    "decoding": Case(b=3, t=1, s=140, dtype="bfloat16", bank="bfloat16", ranges=(((0, 99),), ((80, 70),), ((5, 0),))),
    "long documents": Case(c=400, ranges=(((3, 300), (80, 310)), ((70, 257), (0, 0)))),
    "the bank alone": Case(s=0),
    "own tokens alone": Case(ranges=((), ())),
    "a bank of nothing": Case(c=0, ranges=(((0, 0),), ((0, 0),))),
    "few chunks": Case(c=5, ranges=(((0, 5), (2, 1)), ((1, 3), (0, 0)))),
    "few chunks, int8": Case(bank="int8", d=32, c=5, ranges=(((0, 5), (2, 1)), ((1, 3), (0, 0)))),
    "nothing selected, nothing owned": Case(s=0, ranges=(((0, 0), (9, 0)), ((4, 3), (7, 0)))),
}
FLOATS = ("q", "k", "v", "bank_k", "bank_v", "bias")


def make(name):
    """Arguments of a case. The last question owns no token where there are two: it lives on the bank."""
    case = CASES[name]
    rng = np.random.default_rng(list(name.encode()))
    mask = rng.random((case.b, case.s)) > 0.25
    if case.b > 1:
        mask[-1] = False
    ranges = np.array(case.ranges, np.int32).reshape(case.b, -1, 2)
    normal = lambda *shape, dtype=case.dtype: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    own, bank = (case.b, case.s, case.kv, case.d), (case.c, case.kv, case.d)
    args = dict(q=normal(case.b, case.t, case.h, case.d), k=normal(*own), v=normal(*own), mask=jnp.asarray(mask))
    args |= dict(starts=jnp.asarray(ranges[..., 0]), lengths=jnp.asarray(ranges[..., 1]), max_length=case.max_length)
    if case.bank == "int8":
        for name in ("bank_k", "bank_v"):
            args[name] = jnp.asarray(rng.integers(-127, 128, bank), jnp.int8)
            args[f"{name}_scale"] = jnp.asarray(rng.uniform(0.005, 0.02, (case.kv, case.c)), jnp.float32)
    else:
        args |= dict(bank_k=normal(*bank, dtype=case.bank), bank_v=normal(*bank, dtype=case.bank))
    if case.bias:
        args["bias"] = normal(case.b, ranges.shape[1], case.h, dtype="float32")
    return args


def dense(q, k, v, bank_k, bank_v, mask, starts, lengths, bias=None, bank_k_scale=None, bank_v_scale=None, **_):
    """The definition over the whole bank: [documents x bank ; own] columns, all but the selected ones masked."""
    (b, t, h, d), s, (c, kv) = q.shape, k.shape[1], bank_k.shape[:2]
    if bank_k_scale is not None:
        bank_k = (bank_k * bank_k_scale.T[..., None]).astype(q.dtype)
        bank_v = (bank_v * bank_v_scale.T[..., None]).astype(q.dtype)
    documents = starts.shape[1]
    chunk = jnp.arange(c)[None, None]
    inside = (chunk >= starts[..., None]) & (chunk < (starts + lengths)[..., None])  # [B, k, C]
    own = (jnp.arange(s)[None] <= jnp.arange(t)[:, None] + (s - t))[None] & mask[:, None, :]
    allowed = jnp.concatenate([jnp.broadcast_to(inside.reshape(b, 1, -1), (b, t, documents * c)), own], axis=-1)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def columns(bank, own):
        spread = jnp.broadcast_to(bank[None, None], (b, documents, *bank.shape)).reshape(b, documents * c, kv, d)
        every = jnp.concatenate([spread.astype(q.dtype), own], axis=1)
        return jnp.repeat(every, h // kv, axis=2)

    logits = jnp.einsum("bthd,bshd->bhts", q, columns(bank_k, k)).astype(wide) * d**-0.5
    if bias is not None:
        spread = jnp.repeat(bias, c, axis=1).swapaxes(1, 2)[:, :, None, :]
        logits = logits + jnp.pad(spread.astype(wide), ((0, 0),) * 3 + ((0, s),))
    logits = jnp.where(allowed[:, None], logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=MASKED))
    weights = jnp.where(allowed[:, None], jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bhts,bshd->bthd", (weights / safe).astype(q.dtype), columns(bank_v, v))
    return out, jnp.where(total > 0, top + jnp.log(safe), MASKED)[..., 0].swapaxes(1, 2)


def in_float64(args):
    """Everything in float64: the oracle."""
    return {n: x.astype(jnp.float64) if n in FLOATS and x.dtype != jnp.int8 else x for n, x in args.items()}


def pulled(function, args, cotangents, times=1):
    """Outputs of `function`, and the gradients of the float arguments for `cotangents`; of each of several runs."""
    floats = {n: x for n, x in args.items() if n in FLOATS and jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {n: x for n, x in args.items() if n not in floats}

    def run(floats):
        outs, vjp = jax.vjp(lambda floats: function(**floats, **rest), floats)
        return outs, vjp(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outs, strict=True)))[0]

    run = jax.jit(run)
    return jax.device_get([run(floats) for _ in range(times)])


def supported(implementation, args):
    """`gather_attention` by that implementation; a case it declares unsupported must raise, and is skipped."""

    def call(**args):
        return gather_attention(implementation=implementation, **args)

    if implementation != "xla":
        with running(implementation):
            try:
                jax.eval_shape(lambda: call(**args))
            except NotImplementedError as error:
                pytest.skip(str(error))
    return call


def poison(args):
    """NaN in every chunk that no range holds, and large numbers in every own token that does not exist."""
    held = np.zeros(args["bank_k"].shape[0], bool)
    for start, length in zip(np.ravel(args["starts"]), np.ravel(args["lengths"]), strict=True):
        held[start : start + length] = True
    args = args | {n: jnp.where(args["mask"][..., None, None], args[n], 1e4) for n in ("k", "v")}
    if args["bank_k"].dtype == jnp.int8:
        return args | {n: jnp.where(held[None], args[n], jnp.nan) for n in ("bank_k_scale", "bank_v_scale")}
    return args | {n: jnp.where(held[:, None, None], args[n], jnp.nan) for n in ("bank_k", "bank_v")}


@pytest.mark.parametrize(
    ("name", "implementation"),
    matrix(
        CASES,
        xla=["plain", "bfloat16", "int8", "several blocks of queries", "few chunks", "nothing selected, nothing owned"],
        tpu=["bfloat16", "int8, fp32 query", "nothing selected, nothing owned"],
    ),
)
def test_outputs_and_gradients_are_the_definition(name, implementation):
    args = make(name)
    call = supported(implementation, args)
    rng = np.random.default_rng(1)
    cotangents = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (args["q"].shape, args["q"].shape[:3])]
    with jax.enable_x64(True):
        ((want, want_grads),) = pulled(dense, in_float64(args), cotangents)
    ((plain, plain_grads),) = pulled(dense, args, cotangents)
    with running(implementation):
        # Interpreting GPU kernels is slow: two of their cases run twice.
        twice = implementation != "gpu" or name in ("plain", "int8")
        runs = pulled(call, poison(args), cotangents, times=1 + twice)
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[-1])
    got, got_grads = runs[0]
    assert got[0].dtype == args["q"].dtype and got[1].dtype == np.float32
    nothing = want[1] == MASKED
    np.testing.assert_array_equal(got[1][nothing], np.float32(MASKED))
    np.testing.assert_array_equal(got[0][nothing], 0)
    at_most_twice(got[0], want[0], plain[0])
    at_most_twice(got[1][~nothing], want[1][~nothing], plain[1][~nothing])
    for leaf in want_grads:
        assert got_grads[leaf].dtype == args[leaf].dtype and got_grads[leaf].shape == args[leaf].shape
        at_most_twice(got_grads[leaf], want_grads[leaf], plain_grads[leaf])


@pytest.mark.parametrize(("name", "implementation"), matrix(["plain"], tpu=["plain"]))
def test_parts_merge_into_the_whole(name, implementation):
    args = make(name)
    call = supported(implementation, args)
    bank = {n: args[n] for n in ("q", "bank_k", "bank_v")}
    half = {n: args[n][:, :1] for n in ("starts", "lengths", "bias")}
    other = {n: args[n][:, 1:] for n in ("starts", "lengths", "bias")}
    nothing = dict(k=args["k"][:, :0], v=args["v"][:, :0])
    with running(implementation):
        whole = jax.device_get(call(**args))
        parts = [call(**bank, **half, **nothing), call(**args | other)]
        merged = jax.device_get(merge(*zip(*parts, strict=True)))
    np.testing.assert_allclose(merged[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(merged[1], whole[1], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "implementation"),
    matrix(["plain", "int8", "few chunks, int8"], xla=["plain", "int8"], tpu=["few chunks, int8"]),
)
def test_a_layer_is_read_where_it_lies(name, implementation):
    args = make(name)
    call = supported(implementation, args)
    banks = [n for n in args if n.startswith("bank_")]
    # The other layers are poison, which int8 cannot hold but its scales can.
    stack = lambda x: jnp.stack([jnp.full_like(x, 7 if x.dtype == jnp.int8 else jnp.nan), x, x])  # noqa: E731
    stacked = args | {n: stack(args[n]).at[2].multiply(3) for n in banks}
    cotangents = [jnp.ones(args["q"].shape), jnp.ones(args["q"].shape[:3])]
    with running(implementation):
        ((want, want_grads),) = pulled(call, args, cotangents)
        ((got, got_grads),) = pulled(lambda **args: call(**args, layer=1), stacked, cotangents)
    # Blocks may be cut elsewhere, so sums differ in rounding.
    atol = 2e-2 if args["q"].dtype == jnp.bfloat16 else 1e-5
    wide = lambda x: np.asarray(x, np.float32)  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_allclose(wide(a), wide(b), atol=atol), got, want)
    for leaf, want_grad in want_grads.items():
        got_grad = got_grads[leaf]
        if leaf in banks:
            assert not got_grad[0].any() and not got_grad[2].any()
            got_grad = got_grad[1]
        np.testing.assert_allclose(wide(got_grad), wide(want_grad), atol=atol)


@pytest.mark.parametrize(("name", "implementation"), matrix(["plain"], tpu=["plain"]))
def test_what_a_range_has_outside_of_the_bank_does_not_count(name, implementation):
    args = make(name)
    c = args["bank_k"].shape[0]
    starts, lengths = jnp.array([[-3, c - 2, c + 5]] * 2, jnp.int32), jnp.array([[5, 9, 4]] * 2, jnp.int32)
    cut = dict(starts=jnp.array([[0, c - 2, c]] * 2, jnp.int32), lengths=jnp.array([[2, 2, 0]] * 2, jnp.int32))
    call = supported(implementation, args)
    with running(implementation):
        got = jax.device_get(call(**args | dict(starts=starts, lengths=lengths)))
        want = jax.device_get(call(**args | cut))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "xla"])
def test_an_unsupported_case_raises_by_name(implementation):
    args = {n: x.astype(jnp.float16) if n in ("q", "k", "v") else x for n, x in make("plain").items()}
    with running(implementation), pytest.raises(NotImplementedError, match="cannot run this: .*float16"):
        gather_attention(**args, implementation=implementation)
    assert dispatch.module("gather_attention", "xla").unsupported(operands=None) is None
