"""Layers against NumPy in float64: norms, rotation, pooling, and a whole layer of Memory Sparse Attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax import AttentionConfig, MemorySparseAttention, MSAConfig
from msa_jax.data.batch import pack_documents
from msa_jax.errors import ConfigError
from msa_jax.layers.attention import pool_chunks
from msa_jax.layers.linear import linear
from msa_jax.layers.mlp import GatedMLP
from msa_jax.layers.norm import RMSNorm
from msa_jax.layers.rope import rope
from msa_jax.memory import DocumentLayout
from msa_jax.spec import LayerSpec, RopeScaling

B, T, N, E, H, K, D, R, W = 2, 5, 4, 10, 6, 2, 4, 4, 12
G = H // K
CONFIG = AttentionConfig(
    hidden_size=E, num_heads=H, num_kv_heads=K, head_dim=D, rope_theta=50.0, norm_eps=1e-4, chunk_size=4,
    top_k_documents=2, position_offset=7,
)  # fmt: skip
TABLE = np.random.default_rng(99).normal(size=(64, E)).astype(np.float32)
seeds = st.integers(0, 2**31)
lengths = st.lists(st.integers(1, 7), min_size=N, max_size=N)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_rms(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def numpy_rope(x, positions, theta):
    """Pairs (i, i + D / 2) of [T, heads, D] as complex numbers, turned by position * theta^(-i / (D / 2))."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.multiply.outer(positions, theta ** (-np.arange(half) / half)))[:, None, :]
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_rms_norm_equals_numpy():
    norm = RMSNorm(13, eps=0.1, dtype=jnp.float32, param_dtype=jnp.float32)
    norm.scale[...] = jnp.asarray(normal(1, 13))
    x = normal(0, 2, 3, 13)
    np.testing.assert_allclose(norm(x), numpy_rms(x, normal(1, 13), 0.1), atol=1e-6)
    half = RMSNorm(13, eps=0.1, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert half.scale[...].dtype == half(x).dtype == jnp.bfloat16
    # Rounded once, at the end.
    rounded = jnp.asarray(x, jnp.bfloat16)
    want = numpy_rms(np.asarray(rounded, np.float32), 1, 0.1)
    np.testing.assert_allclose(half(rounded).astype(jnp.float32), want, rtol=2.0**-8)


@given(st.lists(st.integers(0, 5000), min_size=T, max_size=T), seeds)
def test_rope_equals_a_rotation_of_complex_numbers(positions, seed):
    x, positions = normal(seed, T, H, D), np.array(positions)
    got = rope(jnp.asarray(x), jnp.asarray(positions), theta=1e4)
    np.testing.assert_allclose(got, numpy_rope(x, positions, 1e4), atol=2e-3)
    near = rope(jnp.asarray(x), jnp.asarray(positions % 50), theta=1e4)
    np.testing.assert_allclose(near, numpy_rope(x, positions % 50, 1e4), atol=2e-5)
    assert rope(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions), theta=1e4).dtype == jnp.bfloat16


def turned(scaling, position, half=32, theta=1e4):
    """Angles and lengths of unit vectors after RoPE at a position, float64."""
    x = jnp.concatenate([jnp.ones(half), jnp.zeros(half)])[None, None]
    got = np.asarray(rope(x, jnp.asarray([position]), theta=theta, scaling=scaling), np.float64)[0, 0]
    got = got[:half] + 1j * got[half:]
    return np.angle(got), np.abs(got)


def test_rope_can_be_stretched():
    plain, _ = turned(None, 1)
    linear, size = turned(RopeScaling(kind="linear", factor=4.0), 1)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-5)
    np.testing.assert_allclose(size, 1, rtol=1e-6)
    # Within 64 tokens: more than 4 turns stay, less than 1 is stretched, and between the two it goes over in a line.
    llama, size = turned(RopeScaling(kind="llama3", factor=8.0, original_length=64), 1)
    turns = 64 * plain / (2 * np.pi)
    kept = np.clip((turns - 1) / 3, 0, 1)
    np.testing.assert_allclose(llama, plain * (kept + (1 - kept) / 8), rtol=1e-5)
    assert (turns > 4).any() and (turns < 1).any() and ((turns > 1) & (turns < 4)).any()
    np.testing.assert_allclose(size, 1, rtol=1e-6)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_goes_over_in_a_line_of_dimensions(truncate):
    plain, _ = turned(None, 1)
    yarn, size = turned(RopeScaling(kind="yarn", factor=4.0, original_length=512, truncate=truncate), 1)
    np.testing.assert_allclose(size, 0.1 * np.log(4) + 1, rtol=1e-6)
    # Dimension i turns 512 * 1e4^(-i / 32) / 2 pi times: 32 times at the first end of the line, once at the last.
    first, last = (32 * np.log(512 / (turns * 2 * np.pi)) / np.log(1e4) for turns in (32, 1))
    first, last = (np.floor(first), np.ceil(last)) if truncate else (first, last)
    ramp = np.clip((np.arange(32) - first) / (last - first), 0, 1)
    np.testing.assert_allclose(yarn, plain * (1 - ramp + ramp / 4), rtol=1e-5)
    assert 0 < first < last < 31
    sharp = RopeScaling(kind="yarn", factor=4.0, original_length=512, attention_factor=2.0)
    np.testing.assert_allclose(turned(sharp, 1)[1], 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(kind="ntk"), "kind must be one of .*'yarn'"),
        (dict(factor=0.5), "RoPE factor must be at least 1"),
        (dict(original_length=0), "needs the length of the training in tokens, got 0"),
        (dict(beta_fast=1.0), "beta_slow of RoPE must be below its beta_fast"),
        (dict(attention_factor=-1.0), "attention_factor of RoPE must be positive"),
    ],
)
def test_scalings_that_cannot_be(changes, match):
    with pytest.raises(ConfigError, match=match):
        RopeScaling(**(dict(kind="yarn", factor=2.0, original_length=8) | changes))


GEMMA = LayerSpec(norm="rms_plus_one", window=3, rope_theta=20.0, query_scale=0.7)


def test_a_window_is_the_same_in_every_way_to_compute_it():
    """A document alone, a question behind a prefix with padding, and one token at a time in a cache."""
    layer = MemorySparseAttention(CONFIG, GEMMA, rngs=nnx.Rngs(0))
    layer.k_norm.scale[...] = jnp.asarray(normal(9, D))
    x, positions = jnp.asarray(normal(1, 1, 8, E)), jnp.arange(8)[None]

    def ways(params):
        same = nnx.merge(nnx.graphdef(layer), params)
        whole, _ = same.encode(x, positions=positions, segment_ids=jnp.ones((1, 8), jnp.int32))
        first = same(x[:, :4], positions=positions[:, :4])
        pad = lambda y: jnp.pad(y, ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=99.0)  # noqa: E731
        past = dict(past_k=pad(first.k), past_v=pad(first.v))
        mask = jnp.asarray([[True] * 4 + [False] * 2 + [True] * 4])
        rest = same(x[:, 4:], positions=positions[:, 4:], mask=mask, **past)
        step = same(x[:, 4:5], positions=positions[:, 4:5], mask=jnp.arange(6)[None] <= 4, slot=jnp.int32(4), **past)
        return whole, same(x, positions=positions).out, rest.out, step.out

    whole, at_once, rest, step = jax.jit(ways)(nnx.state(layer))
    q, k, v = (np.asarray(p.kernel[...], np.float64) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    head = lambda w: np.asarray(x[0], np.float64) @ w  # noqa: E731
    turn = lambda y, scale: numpy_rope(numpy_rms(y.reshape(8, -1, D), 1 + scale, 1e-4), np.arange(8), 20.0)  # noqa: E731
    q, k, v = turn(head(q), 0), turn(head(k), normal(9, D)), head(v).reshape(8, K, D)
    logits = 0.7 * np.einsum("thd,shd->hts", q, np.repeat(k, G, axis=1))
    near = np.tri(8, dtype=bool) & ~np.tri(8, k=-3, dtype=bool)
    weights = np.where(near, np.exp(logits), 0)
    out = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), np.repeat(v, G, axis=1))
    want = out.reshape(8, -1) @ np.asarray(layer.o_proj.kernel[...], np.float64)
    np.testing.assert_allclose(whole[0], want, atol=1e-5)
    np.testing.assert_allclose(at_once, whole, atol=1e-6)
    np.testing.assert_allclose(rest, whole[:, 4:], atol=1e-6)
    np.testing.assert_allclose(step, whole[:, 4:5], atol=1e-6)


def test_what_does_not_fit_the_window_of_a_layer_that_reads_a_memory_is_refused():
    layer = MemorySparseAttention(CONFIG, GEMMA, rngs=nnx.Rngs(0))
    batch = pack_documents([np.arange(5)], chunk_size=4, row_len=8, num_rows=1)
    layout = DocumentLayout(batch.chunk_documents, batch.starts, batch.lengths, max_length=2)

    def ask(count):
        _, states = layer.encode(TABLE[batch.tokens], positions=batch.positions, segment_ids=batch.segment_ids)
        x, memory = jnp.ones((1, count, E)), layer.memory(states, layout)
        return layer(x, positions=jnp.arange(count)[None], memory=memory).out

    assert jax.eval_shape(lambda: ask(3)).shape == (1, 3, E)
    with pytest.raises(ValueError, match="4 own tokens do not fit this layer's window of 3.*other router_layers"):
        jax.eval_shape(lambda: ask(4))


def test_a_gated_mlp_with_gelu():
    mlp = GatedMLP(MSAConfig(hidden_size=E, mlp_size=7), LayerSpec(activation="gelu_tanh"), rngs=nnx.Rngs(0))
    x = normal(0, 3, E)
    gate, up, down = (np.asarray(layer.kernel[...], np.float64) for layer in (mlp.gate, mlp.up, mlp.down))
    gate, up = x @ gate, x @ up
    gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    np.testing.assert_allclose(mlp(x), (gelu * up) @ down, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_equals_numpy(bias):
    mlp = GatedMLP(MSAConfig(hidden_size=E, mlp_size=7), LayerSpec(mlp_bias=bias), rngs=nnx.Rngs(0))
    x = normal(0, 2, 3, E)
    layers = (mlp.gate, mlp.up, mlp.down)
    shift = [0, 0, 0]
    if bias:
        shift = [normal(i, layer.bias.shape[0]) for i, layer in enumerate(layers)]
        for layer, value in zip(layers, shift, strict=True):
            layer.bias[...] = jnp.asarray(value)
    weights = [np.asarray(layer.kernel[...], np.float64) for layer in layers]
    gate, up = (x @ weights[i] + shift[i] for i in range(2))
    np.testing.assert_allclose(mlp(x), (gate / (1 + np.exp(-gate)) * up) @ weights[2] + shift[2], atol=1e-6)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_linear_contracts_the_last_axis(leading):
    layer = linear(E, 7, CONFIG, nnx.Rngs(0))
    x = normal(0, *leading, E)
    assert layer.bias is None
    np.testing.assert_allclose(layer(x), x @ np.asarray(layer.kernel[...]), atol=1e-5)


@given(lengths, seeds)
def test_pooling_takes_the_mean_of_the_tokens_that_exist(lengths, seed):
    """Every token counts once, in its own chunk; a ragged last chunk is the mean of what it has."""
    rounded, chunk = jnp.asarray(normal(seed, R, W, K, D), jnp.bfloat16), 4
    documents = pack_documents([np.arange(n) for n in lengths], chunk_size=chunk, row_len=W, num_rows=R)
    want = np.zeros((R * W // chunk, K, D))
    flat = np.asarray(rounded, np.float32).reshape(R * W, K, D)
    for start, length in zip(documents.starts, lengths, strict=True):
        for first in range(0, length, chunk):
            tokens = flat[start * chunk + first : start * chunk + min(first + chunk, length)]
            want[start + first // chunk] = tokens.mean(axis=0)
    for x in (rounded, rounded.astype(jnp.float32)):
        got = pool_chunks(x, jnp.asarray(documents.segment_ids), chunk)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-6)


def weights(layer):
    return {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(layer))}


def numpy_qkv(layer, x, positions):
    w, c = weights(layer), layer.config
    heads = lambda name: (x @ w[f"{name}_proj/kernel"]).reshape(len(x), -1, D)  # noqa: E731
    q, k = (
        numpy_rope(numpy_rms(heads(name), w[f"{name}_norm/scale"], c.norm_eps), positions, c.rope_theta)
        for name in "qk"
    )
    return q, k, heads("v")


def numpy_attention(layer, q, keys, values, bias, allowed):
    """q [T, H, D]; keys, values [S, K, D]; bias [S, H]; allowed [T, S]: out [T, E]."""
    keys, values = np.repeat(keys, G, axis=1), np.repeat(values, G, axis=1)
    logits = np.einsum("thd,shd->ths", q, keys) / np.sqrt(D) + bias.T[None]
    exp = np.where(allowed[:, None], np.exp(logits), 0)
    out = np.einsum("ths,shd->thd", exp / exp.sum(-1, keepdims=True), values)
    return out.reshape(len(q), -1) @ weights(layer)["o_proj/kernel"]


def numpy_msa(layer, documents, x, positions, visible):
    """The definition: out of every document alone, out of one question [T, E], its document scores [N]."""
    w, c = weights(layer), layer.config
    outs, chunks, scores = [], [], np.full(len(documents), -1e30)
    unit = lambda y: y / np.linalg.norm(y, axis=-1, keepdims=True)  # noqa: E731
    routing = unit((x @ w["router_q_proj/kernel"]).reshape(len(x), H, D))
    for n, h in enumerate(documents):
        size = len(h)
        q, k, v = numpy_qkv(layer, h, np.arange(size))
        outs.append(numpy_attention(layer, q, k, v, np.zeros((size, H)), np.tri(size, dtype=bool)))
        router = (h @ w["router_k_proj/kernel"]).reshape(size, K, D)
        split = lambda y: [y[i : i + c.chunk_size].mean(0) for i in range(0, len(y), c.chunk_size)]  # noqa: E731
        chunks.append((np.stack(split(k)), np.stack(split(v))))
        cosines = np.einsum("thd,chd->tch", routing, np.repeat(unit(np.stack(split(router))), G, axis=1)).mean(-1)
        scores[n] = cosines.max() if visible[n] else -1e30
    q, k, v = numpy_qkv(layer, x, positions)
    parts, best = [(k, v, np.zeros((len(x), H)))], scores.max()
    for n in np.argsort(-scores)[: c.top_k_documents]:
        if visible[n]:
            bias = c.router_bias_scale * w["router_beta"] * (scores[n] - best) if c.router_bias else np.zeros(H)
            bias = bias + np.log(c.chunk_size) * c.proportional_attention
            parts.insert(0, (*chunks[n], np.broadcast_to(bias, (len(chunks[n][0]), H))))
    keys, values, bias = (np.concatenate(p) for p in zip(*parts, strict=True))
    read = len(keys) - len(x)
    allowed = np.concatenate([np.ones((len(x), read), bool), np.tri(len(x), dtype=bool)], axis=1)
    return outs, numpy_attention(layer, q, keys, values, bias, allowed), scores


@functools.partial(jax.jit, static_argnames="graphdef")
def run(graphdef, params, table, batch, x, positions, visible):
    layer = nnx.merge(graphdef, params)
    encoded, states = layer.encode(table[batch.tokens], positions=batch.positions, segment_ids=batch.segment_ids)
    layout = DocumentLayout(batch.chunk_documents, batch.starts, batch.lengths, max_length=W // layer.config.chunk_size)
    return encoded, layer(
        x, positions=positions, memory=layer.memory(states, layout), visible=visible, return_scores=True
    )


FORMS = {
    # With P = 1 and every document selected this is dense attention over the concatenated documents.
    "dense": dict(chunk_size=1, top_k_documents=N),
    "sparse": dict(),
    "router bias": dict(router_bias=True, router_bias_init=3.0),
    "sharper router bias": dict(router_bias=True, router_bias_init=3.0, router_bias_scale=2.5),
    "proportional": dict(proportional_attention=True),
    "proportional, with a router bias": dict(proportional_attention=True, router_bias=True, router_bias_init=3.0),
}


@functools.cache
def layer_of(form):
    layer = MemorySparseAttention(AttentionConfig(**(vars(CONFIG) | FORMS[form])), rngs=nnx.Rngs(5))
    for i, norm in enumerate((layer.q_norm, layer.k_norm)):
        norm.scale[...] = jnp.asarray(1 + 0.3 * normal(i, D))
    return layer


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8)
@given(seed=seeds, lengths=lengths, visible=st.lists(st.booleans(), min_size=N, max_size=N))
def test_memory_sparse_attention_equals_its_definition(form, seed, lengths, visible):
    layer = layer_of(form)
    visible = np.array([visible, [True] * N])
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, len(TABLE), n) for n in lengths]
    batch = pack_documents(tokens, chunk_size=layer.config.chunk_size, row_len=W, num_rows=R)
    x, positions = normal(seed, B, T, E), np.stack([np.arange(T) + 7, np.arange(T) + 11])
    encoded, result = run(*nnx.split(layer), TABLE, batch, x, positions, visible)
    for b in range(B):
        documents = [TABLE[t].astype(np.float64) for t in tokens]
        outs, out, scores = numpy_msa(layer, documents, x[b].astype(np.float64), positions[b], visible[b])
        np.testing.assert_allclose(result.document_scores[b], scores, atol=1e-5)
        np.testing.assert_allclose(result.out[b], out, atol=2e-5)
    flat = np.asarray(encoded).reshape(R * W, E)
    for start, want in zip(batch.starts * layer.config.chunk_size, outs, strict=True):
        np.testing.assert_allclose(flat[start : start + len(want)], want, atol=2e-5)
