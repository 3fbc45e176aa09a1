"""The attention layers as building blocks: caches, masks, defaults, gradients, stacks, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax import AttentionConfig, MemorySparseAttention, MSAConfig
from msa_jax.layers.attention import SelfAttention, pool_chunks
from msa_jax.layers.block import DecoderBlock, scan_stack, stack
from msa_jax.memory import DocumentLayout, LayerMemory

B, T, N, E, W, P = 2, 5, 4, 10, 8, 4
CONFIG = AttentionConfig(hidden_size=E, num_heads=6, num_kv_heads=2, head_dim=4, chunk_size=P, top_k_documents=2)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, DOCS = normal(0, B, T, E), normal(1, N, W, E)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32) + 19, (B, T))
DOC_POSITIONS = np.broadcast_to(np.arange(W, dtype=np.int32), (N, W))
SEGMENTS = np.ones((N, W), np.int32)
LAYOUT = DocumentLayout.from_chunk_documents(np.repeat(np.arange(N), W // P), N)


@functools.cache
def layer_of(kind=MemorySparseAttention):
    return kind(CONFIG, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnames="graphdef")
def _encode(graphdef, params, documents):
    return nnx.merge(graphdef, params).encode(documents, positions=DOC_POSITIONS, segment_ids=SEGMENTS)


def encode(layer, documents):
    return _encode(*nnx.split(layer), documents)


@functools.cache
def memory():
    layer = layer_of()
    return layer.memory(encode(layer, DOCS)[1], LAYOUT)


@functools.partial(jax.jit, static_argnames="graphdef")
def _call(graphdef, params, x, positions, kwargs):
    if kwargs.get("memory") is not None and kwargs.get("selection") is None:
        kwargs |= dict(return_scores=True)
    return nnx.merge(graphdef, params)(x, positions=positions, **kwargs)


def call(x=X, positions=POSITIONS, kind=MemorySparseAttention, layer=None, **kwargs):
    return _call(*nnx.split(layer or layer_of(kind)), x, positions, kwargs)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_positions_reach_attention_to_memory_but_not_routing():
    near, far = call(memory=memory()), call(positions=POSITIONS + 7, memory=memory())
    np.testing.assert_array_equal(near.document_scores, far.document_scores)
    assert np.abs(near.out - far.out).max() > 1e-3  # documents keep their positions: they are further away
    close(call(positions=POSITIONS + 7).out, call().out)  # among own tokens only distances count


@pytest.mark.parametrize("kind", [SelfAttention, MemorySparseAttention])
def test_without_memory_both_layers_are_causal_attention(kind):
    out = call(kind=kind).out
    changed = X.copy()
    changed[:, 3:] += 1
    close(call(changed, kind=kind).out[:, :3], out[:, :3])
    assert np.abs(call(changed, kind=kind).out[:, 3] - out[:, 3]).max() > 1e-2


@pytest.mark.parametrize("kind", [SelfAttention, MemorySparseAttention])
def test_a_document_alone_is_causal_attention(kind):
    encoded = encode(layer_of(kind), DOCS)[0]
    close(encoded, call(DOCS, DOC_POSITIONS, kind=kind).out)


@pytest.mark.parametrize("with_memory", [False, True])
def test_a_past_equals_one_pass(with_memory):
    kwargs = dict(memory=memory()) if with_memory else {}
    whole = call(**kwargs)
    first = call(X[:, :2], POSITIONS[:, :2])
    kwargs |= dict(selection=whole.selection) if with_memory else {}
    rest = call(X[:, 2:], POSITIONS[:, 2:], past_k=first.k, past_v=first.v, **kwargs)
    close(rest.out, whole.out[:, 2:])
    close(rest.k, whole.k)


def test_a_past_of_batch_one_serves_every_question():
    first = call(X[:1, :2], POSITIONS[:1, :2])
    both = [np.repeat(x, B, axis=0) for x in (first.k, first.v)]
    args = dict(x=X[:, 2:], positions=POSITIONS[:, 2:])
    close(call(**args, past_k=first.k, past_v=first.v).out, call(**args, past_k=both[0], past_v=both[1]).out)


@pytest.mark.parametrize("with_memory", [False, True])
def test_a_cache_with_a_slot_equals_one_pass(with_memory):
    kwargs = dict(memory=memory()) if with_memory else {}
    whole = call(**kwargs)
    cache = [np.pad(x[:, :3], ((0, 0), (0, 6), (0, 0), (0, 0)), constant_values=9.0) for x in (whole.k, whole.v)]
    mask = np.broadcast_to(np.arange(9) < 4, (B, 9))
    kwargs |= dict(selection=whole.selection) if with_memory else {}
    step = call(X[:, 3:4], POSITIONS[:, 3:4], past_k=cache[0], past_v=cache[1], slot=3, mask=mask, **kwargs)
    close(step.out, whole.out[:, 3:4])
    close(step.k[:, :4], whole.k[:, :4])
    assert (step.k[:, 4:] == 9).all() and step.document_scores is None


def test_routing_tokens_are_by_default_those_that_the_mask_keeps():
    mask = np.ones((B, T), bool)
    mask[1, 3:] = False
    want = call(memory=memory(), mask=mask, route=mask)
    default = call(memory=memory(), mask=mask)
    close(default.document_scores, want.document_scores)
    assert np.abs(call(memory=memory()).document_scores[1] - default.document_scores[1]).max() > 1e-3
    prefix = call(X[:, :2], POSITIONS[:, :2])
    own = np.concatenate([np.ones((B, 2), bool), mask], axis=1)
    longer = call(memory=memory(), past_k=prefix.k, past_v=prefix.v, mask=own)
    close(longer.document_scores, want.document_scores)


def test_a_token_decoded_into_a_slot_routes_by_default():
    cache = np.zeros((B, 9, 2, 4), np.float32)
    mask = np.broadcast_to(np.arange(9) < 4, (B, 9))
    args = dict(x=X[:, 3:4], positions=POSITIONS[:, 3:4], past_k=cache, past_v=cache, slot=3, memory=memory())
    got, want = call(**args, mask=mask), call(**args, mask=mask, route=np.ones((B, 1), bool))
    np.testing.assert_array_equal(got.document_scores, want.document_scores)
    assert (got.selection.lengths > 0).all()


def test_gradients_reach_documents_through_selected_content_and_through_scores():
    layer = layer_of()

    @jax.jit
    def forward(documents):
        states = layer.encode(documents, positions=DOC_POSITIONS, segment_ids=SEGMENTS)[1]
        return layer(X, positions=POSITIONS, memory=layer.memory(states, LAYOUT), return_scores=True)

    selected = np.asarray(forward(DOCS).selection.documents)
    for b in range(B):
        grads = jax.grad(lambda d, b=b: jnp.sum(forward(d).out[b] ** 2))(DOCS)
        reached = np.flatnonzero(np.abs(grads).sum((1, 2)) > 0)
        np.testing.assert_array_equal(reached, np.sort(selected[b]))
    grads = jax.grad(lambda d: jnp.sum(forward(d).document_scores ** 2))(DOCS)
    assert (np.abs(grads).sum((1, 2)) > 0).all()


@pytest.mark.parametrize("router_bias", [False, True])
def test_the_output_trains_the_router_with_a_router_bias_alone(router_bias):
    layer = MemorySparseAttention(dataclasses.replace(CONFIG, router_bias=router_bias), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    loss = lambda params: jnp.sum(_call(graphdef, params, X, POSITIONS, dict(memory=memory())).out ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    assert np.any(grads["router_q_proj"]["kernel"][...]) == router_bias
    assert not router_bias or np.any(grads["router_beta"][...])


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31 - 1), biased=st.booleans())
def test_a_chunk_of_equal_tokens_weighs_as_the_tokens_themselves(seed, biased):
    # Documents whose chunks hold P equal tokens each, read as chunks and as single tokens.
    chunks = N * W // P
    keys, values = normal(seed, chunks, 2, 4), normal(seed + 1, chunks, 2, 4)
    routing_keys = normal(seed + 2, chunks, 8)
    routing_keys /= np.linalg.norm(routing_keys, axis=-1, keepdims=True)
    config = dataclasses.replace(CONFIG, proportional_attention=True, router_bias=biased, router_bias_init=3.0)

    def read(chunk_size, times, proportional=True):
        changed = dataclasses.replace(config, chunk_size=chunk_size, proportional_attention=proportional)
        layout = DocumentLayout.from_chunk_documents(np.repeat(np.arange(N), W // P * times), N)
        kept = LayerMemory(*(jnp.asarray(a.repeat(times, 0)) for a in (routing_keys, keys, values)), layout=layout)
        return call(layer=MemorySparseAttention(changed, rngs=nnx.Rngs(0)), memory=kept).out

    np.testing.assert_allclose(read(P, 1), read(1, P), rtol=2e-5, atol=2e-6)
    assert not np.allclose(read(P, 1, proportional=False), read(1, P), atol=1e-3)


def test_dot_routing_depends_on_the_length_of_vectors():
    dot = MemorySparseAttention(dataclasses.replace(CONFIG, routing_score="dot"), rngs=nnx.Rngs(0))

    def scores(layer, scale):
        states = encode(layer, scale * DOCS)[1]
        return call(layer=layer, memory=layer.memory(states, LAYOUT)).document_scores

    np.testing.assert_allclose(scores(dot, 2), 2 * scores(dot, 1), rtol=1e-4)
    close(scores(layer_of(), 2), scores(layer_of(), 1))


def test_compute_dtype_and_storage_dtype():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16", router_bias=True)
    layer = MemorySparseAttention(config, rngs=nnx.Rngs(0))
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(layer))} == {"bfloat16", "float32"}  # beta stays float32
    states = encode(layer, DOCS)[1]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(states))
    result = call(jnp.asarray(X, jnp.bfloat16), layer=layer, memory=layer.memory(states, LAYOUT))
    assert result.out.dtype == jnp.bfloat16 and result.document_scores.dtype == jnp.float32


BLOCKS = MSAConfig(**(vars(CONFIG) | dict(vocab_size=5, mlp_size=7, num_layers=3)))


@jax.jit
def _through_blocks(stacked, x, scales):
    """The stack, and its blocks and their parts one by one."""
    body = lambda layer, x, scale: (layer(x * scale, positions=POSITIONS)[0], x)  # noqa: E731
    got = scan_stack(nnx.merge(*stacked), body, x, scales, remat="none")
    blocks, parts = [x], [x]
    for i in range(3):
        block = nnx.merge(stacked[0], jax.tree.map(lambda leaf, i=i: leaf[i], stacked[1]))
        blocks.append(block(blocks[-1] * scales[i], positions=POSITIONS)[0])
        y = parts[-1] * scales[i]
        y += block.attention(block.attention_norm(y), positions=POSITIONS).out
        parts.append(y + block.mlp(block.mlp_norm(y)))
    encoded = block.encode(blocks[-2] * scales[-1], positions=POSITIONS, segment_ids=jnp.ones((B, T), jnp.int32))[0]
    return got, blocks, parts, encoded


def test_a_stack_equals_its_blocks_and_a_block_its_parts():
    stacked = stack(lambda rngs: DecoderBlock(BLOCKS, router=False, rngs=rngs), 3, nnx.Rngs(3))
    (out, inputs), blocks, parts, encoded = _through_blocks(nnx.split(stacked), jnp.asarray(X), normal(4, 3))
    np.testing.assert_allclose([*inputs, out], blocks, atol=1e-5)
    np.testing.assert_allclose(blocks, parts, atol=1e-5)
    np.testing.assert_allclose(encoded, out, atol=1e-5)
    kernels = stacked.attention.q_proj.kernel[...]
    assert np.abs(kernels[0] - kernels[1]).min() > 0  # each drawn on its own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=X[0]), r"MemorySparseAttention: need x \[B, T, 10\] and positions \[B, T\], got \(5, 10\)"),
        (dict(x=X[..., :9]), r"got \(2, 5, 9\) and \(2, 5\)"),
        (dict(positions=POSITIONS[:, 1:]), r"got \(2, 5, 10\) and \(2, 4\)"),
        (
            dict(past_k=np.zeros((B, 9, 2, 4)), past_v=np.zeros((B, 9, 2, 4)), slot=3),
            "MemorySparseAttention: a cache slot takes one token at a time, got T 5",
        ),
        (dict(memory="short"), r"LayerMemory: routing_keys must be \[C, M\] = \(8, 8\), got \(7, 8\)"),
        (dict(memory="narrow"), r"to route, routing_keys must be \[C, M\] = \(8, 8\), got \(8, 7\)"),
    ],
)
def test_errors_say_what_is_wrong(change, message):
    keys = memory().routing_keys
    broken = {"short": keys[1:], "narrow": keys[:, 1:]}
    if "memory" in change:
        change = dict(memory=memory().replace(routing_keys=broken[change["memory"]]))
    with pytest.raises(ValueError, match=message):
        layer_of()(**(dict(x=X, positions=POSITIONS) | change))


def test_pooling_refuses_rows_that_are_no_multiple_of_a_chunk():
    with pytest.raises(ValueError, match="pool_chunks: row length 10 is not a multiple of the chunk size 4"):
        pool_chunks(jnp.zeros((1, 10, 2)), jnp.ones((1, 10), jnp.int32), 4)
