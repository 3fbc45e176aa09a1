"""Banks in int8: bounds of the error, edge cases, and the model's answers from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from msa_jax import MemoryBank, MSAConfig, MSATransformer
from msa_jax.bank.quantization import quantize, quantize_content, quantize_keys
from msa_jax.context import Reuse, Route
from msa_jax.memory import DocumentLayout

B, T, V, N, LAYERS, HEADS, WIDTH = 3, 5, 41, 7, 2, 2, 6
LENGTHS = (3, 1, 2, 5, 1, 2, 3)
CONFIG = MSAConfig(
    vocab_size=V, hidden_size=12, num_layers=3, router_layers=(1, 2), num_heads=4, num_kv_heads=HEADS, head_dim=WIDTH,
    mlp_size=20, chunk_size=4, top_k_documents=3, position_offset=5, router_bias=True, router_bias_init=1.0,
)  # fmt: skip
TINY = float(np.finfo(np.float32).tiny)
VECTORS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=3, max_dims=4, max_side=5),
    elements=st.one_of(
        st.floats(-2, 2, width=32),
        st.floats(-(2.0**120), 2.0**120, width=32),
        st.floats(-(2.0**-100), 2.0**-100, width=32, allow_subnormal=False),
        st.just(0.0),
    ),
)


def dequantized(values, scale):
    return np.asarray(values, np.float64) * np.asarray(scale, np.float64)[..., None]


@given(VECTORS)
def test_an_element_is_at_most_half_a_scale_off(x):
    values, scale = quantize_keys(x)
    assert values.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == x.shape[:-1]
    assert (scale > 0).all() and (np.abs(values.astype(int)) <= 127).all()
    error = np.abs(dequantized(values, scale) - x)
    assert (error <= scale[..., None] * (0.5 + 1e-5)).all()
    largest = np.abs(x).max(axis=-1)
    # No finer scale would hold the largest element: nothing of the range of int8 is wasted.
    assert (np.abs(values).max(axis=-1)[largest >= 127 * TINY] == 127).all()


@given(VECTORS)
def test_zero_stays_zero_and_signs_are_symmetric(x):
    values, scale = quantize_keys(x)
    assert (values[x == 0] == 0).all()
    mirrored, same = quantize_keys(-x)
    np.testing.assert_array_equal(mirrored, -values)
    np.testing.assert_array_equal(same, scale)


@given(VECTORS)
def test_quantising_again_changes_nothing(x):
    values, scale = quantize_keys(x)
    again, scale_again = quantize_keys(dequantized(values, scale).astype(np.float32))
    np.testing.assert_array_equal(again, values)
    np.testing.assert_allclose(scale_again, scale, rtol=3e-7)


@given(VECTORS, st.integers(1, 4))
def test_content_has_a_scale_a_chunk_and_head_and_may_come_in_pieces(x, cut):
    values, scale = quantize_content(x)
    assert scale.shape == (*x.shape[:-3], x.shape[-2], x.shape[-3])
    rows, row_scale = quantize_keys(x)
    np.testing.assert_array_equal(values, rows)
    np.testing.assert_array_equal(np.swapaxes(scale, -1, -2), row_scale)
    pieces = [quantize_content(x[..., i : i + cut, :, :]) for i in range(0, x.shape[-3], cut)]
    np.testing.assert_array_equal(np.concatenate([v for v, _ in pieces], axis=-3), values)
    np.testing.assert_array_equal(np.concatenate([s for _, s in pieces], axis=-1), scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("function", [quantize_keys, quantize_content])
def test_what_is_not_finite_is_refused(function, bad):
    x = np.ones((2, 3, 4), np.float32)
    x[1, 2, 3] = bad
    with pytest.raises(ValueError, match="every vector must be finite, 1 are not"):
        function(x)


@functools.cache
def bank_of(dtype="float32"):
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(N), LENGTHS)
    keys, k, v = (rng.normal(size=(LAYERS, len(owners), HEADS, WIDTH)).astype(np.float32) for _ in range(3))
    keys = (keys / np.linalg.norm(keys, axis=-1, keepdims=True)).reshape(LAYERS, len(owners), -1)
    arrays = (jnp.asarray(x, dtype) for x in (keys, k, v))
    return MemoryBank(*arrays, DocumentLayout.from_chunk_documents(owners, N))


def floats(bank):
    """An int8 bank as the float32 one that it stands for."""
    scales = dict(key_scale=None, content_k_scale=None, content_v_scale=None)
    content = {
        name: dequantized(getattr(bank, name), np.swapaxes(getattr(bank, f"{name}_scale"), -1, -2))
        for name in ("content_k", "content_v")
    }
    keys = dequantized(bank.routing_keys, bank.key_scale)
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in dict(content, routing_keys=keys).items()}
    return bank.replace(**arrays, **scales)


@functools.cache
def model_of():
    config, rng = CONFIG, np.random.default_rng(1)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0))))
    draw = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    return graphdef, jax.tree.map(draw, state)


@functools.partial(jax.jit, static_argnames="graphdef")
def _run(graphdef, params, tokens, read):
    model = nnx.merge(graphdef, params)
    output = model.prefill(tokens, read=read)
    return model.logits(output.hidden), output.document_scores, output.selection


def run(bank, selection=None, **kwargs):
    read = Route(bank, want=("scores",), **kwargs) if selection is None else Reuse(bank, selection)
    return _run(*model_of(), np.random.default_rng(2).integers(0, V, (B, T)), read)


@pytest.mark.parametrize("bank_gradients", [False, True])
def test_the_model_reads_an_int8_bank_as_the_floats_it_stands_for(bank_gradients):
    bank = quantize(bank_of())
    logits, scores, selection = run(bank, bank_gradients=bank_gradients)
    want_logits, want_scores, want_selection = run(floats(bank), bank_gradients=bank_gradients)
    np.testing.assert_array_equal(selection.documents, want_selection.documents)
    np.testing.assert_allclose(scores, want_scores, atol=2e-5)
    np.testing.assert_allclose(logits, want_logits, atol=2e-5)


def test_answers_from_an_int8_bank_are_close():
    bank = bank_of()
    want, scores, selection = run(bank)
    got = run(quantize(bank), selection)[0]
    assert 0 < np.abs(np.asarray(got - want)).max() < 0.02
    # The second router layer has read what the first one selected from int8 keys.
    assert 0 < np.abs(np.asarray(run(quantize(bank))[1] - scores)).max() < 0.02


def test_a_device_bank_is_quantised_as_host_arrays_are():
    for bank in (bank_of(), bank_of("bfloat16")):
        got = jax.jit(quantize)(bank)
        keys, key_scale = quantize_keys(bank.routing_keys)
        k, k_scale = quantize_content(bank.content_k)
        v, v_scale = quantize_content(bank.content_v)
        wants = (keys, k, v, key_scale, k_scale, v_scale)
        for (name, array), want in zip(got.arrays.items(), wants, strict=True):
            assert array.dtype == want.dtype and array.shape == want.shape, name
            np.testing.assert_allclose(array, want, rtol=3e-7, err_msg=name)
        for before, after in zip(jax.tree.leaves(got), jax.tree.leaves(quantize(got)), strict=True):
            assert before is after
        # A chunk has an element of a byte for two of bfloat16, and three scales a layer and head.
        chunks = bank.num_chunks
        assert got.nbytes == LAYERS * chunks * (3 * HEADS * WIDTH + 4 * (1 + 2 * HEADS))


def test_a_part_that_is_left_stays_as_it_is():
    bank = bank_of()
    keys, content = quantize(bank, content=False), quantize(bank, keys=False)
    assert keys.content_k is bank.content_k and keys.content_k_scale is None and keys.routing_keys.dtype == jnp.int8
    assert content.routing_keys is bank.routing_keys and content.key_scale is None


def test_no_hidden_document_can_influence_an_output():
    visible = np.ones((B, N), bool)
    visible[:, [1, 3]] = False
    bank = quantize(bank_of())
    owners = np.asarray(bank.layout.chunk_documents)
    hidden = np.isin(owners, [1, 3])
    changed = bank.replace(
        routing_keys=jnp.where(hidden[None, :, None], 127, bank.routing_keys).astype(jnp.int8),
        key_scale=jnp.where(hidden[None], 1e6, bank.key_scale),
        content_v=jnp.where(hidden[None, :, None, None], -127, bank.content_v).astype(jnp.int8),
        content_k_scale=jnp.where(hidden[None, None], 1e6, bank.content_k_scale),
    )
    want, got = run(bank, visible=visible), run(changed, visible=visible)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.isin(got[2].documents, [1, 3]).any()
    seen = run(changed)[2].documents
    assert np.isin(seen, [1, 3]).any()


def test_arrays_that_do_not_fit_are_refused_before_anything_is_traced():
    bank = quantize(bank_of())
    model, tokens = nnx.merge(*model_of()), jnp.zeros((B, T), jnp.int32)
    cases = (
        (dict(key_scale=None), "routing_keys of int8 without key_scale"),
        (dict(content_v_scale=None), "content_v of int8 without content_v_scale"),
        (dict(routing_keys=bank_of().routing_keys), "routing_keys of float32 with key_scale"),
        (dict(key_scale=bank.key_scale[:, 1:]), r"key_scale must be \[L_r, C\] = \(2, 17\), got \(2, 16\)"),
        (dict(content_k_scale=bank.content_v_scale.swapaxes(1, 2)), r"content_k_scale must be \[L_r, K, C\]"),
        (dict(content_v=bank.content_v[..., 1:]), r"content_v must be \[L_r, C, K, D\]"),
        (dict(content_k=bank.content_k[:1]), r"content_k must be \[L_r, C, K, D\]"),
        (dict(routing_keys=bank.routing_keys[:, 1:]), r"routing_keys must be \[L_r, C, M\]"),
    )
    for changes, message in cases:
        broken = bank.replace(**changes)
        with pytest.raises(ValueError, match=f"MemoryBank: {message}"):
            model.prefill(tokens, read=Route(broken))
        with pytest.raises(ValueError, match=message):
            quantize(broken)
    one = jax.tree.map(lambda x: x[:1], bank.arrays)
    with pytest.raises(ValueError, match="has 2 router layers, the bank 1"):
        model.prefill(tokens, read=Route(bank.replace(**one)))
    with pytest.raises(ValueError, match="LayerMemory: routing_keys of int8 without key_scale"):
        bank.layer(1).replace(key_scale=None).check()
