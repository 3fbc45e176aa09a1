"""The model: decoding against one pass, stacks against single layers, remat, dtypes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax import MemoryBank, MSAConfig, MSATransformer
from msa_jax.data.batch import pack_documents
from msa_jax.memory import DocumentLayout
from msa_jax.model import KeyValues

B, T, V, N, P, W, PREFIX = 2, 6, 37, 5, 4, 12, 3
CONFIG = MSAConfig(
    vocab_size=V, hidden_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_size=20, chunk_size=P,
    top_k=2, position_offset=5, tie_embeddings=False,
)  # fmt: skip
RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, V, n) for n in (9, 3, 12, 4, 7)]  # 3, 1, 3, 1 and 2 chunks
TOKENS = RNG.integers(0, V, (B, T)).astype(np.int32)
POSITIONS = np.broadcast_to(CONFIG.position_offset + np.arange(T, dtype=np.int32), (B, T))
TEMPLATE = RNG.integers(0, V, (1, PREFIX)).astype(np.int32)


@functools.cache
def model_of(**changes):
    """A model with parameters from NumPy, which takes a tenth of the time of its own initialisation."""
    config, rng = CONFIG.replace(**changes), np.random.default_rng(1)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0))))

    def draw(path, leaf):
        scale = "scale" in jax.tree_util.keystr(path)  # of a norm
        return jnp.asarray(scale + rng.normal(0, 0.3, leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


@functools.cache
def bank_of(layers=1):
    owners = np.repeat(np.arange(N), (3, 1, 3, 1, 2))
    keys, content_k, content_v = (RNG.normal(size=(layers, len(owners), 2, 6)).astype(np.float32) for _ in range(3))
    keys = (keys / np.linalg.norm(keys, axis=-1, keepdims=True)).reshape(layers, -1, 12)
    return MemoryBank(keys, content_k, content_v, layout=DocumentLayout.from_chunk_documents(owners, N))


@functools.partial(jax.jit, static_argnames=("graphdef", "return_hidden"))
def _forward(graphdef, params, tokens, kwargs, return_hidden=False):
    scores = kwargs.get("bank") is not None and kwargs.get("selection") is None
    return nnx.merge(graphdef, params)(tokens, return_hidden=return_hidden, return_scores=scores, **kwargs)


def forward(model=None, tokens=TOKENS, positions=POSITIONS, return_hidden=False, **kwargs):
    return _forward(*nnx.split(model or model_of()), tokens, kwargs | dict(positions=positions), return_hidden)


@functools.cache
def template_of():
    return jax.jit(lambda split: nnx.merge(*split).encode_template(TEMPLATE))(nnx.split(model_of()))


def close(got, want, atol=2e-5):
    np.testing.assert_allclose(got, want, atol=atol)


def test_prefill_then_decode_equals_one_pass():
    """Prompts of 3 and 6 tokens, right-padded, then 4 more tokens each in a cache after a template prefix."""
    bank, more = bank_of(), 4
    sizes, tokens = np.array([3, T]), np.random.default_rng(3).integers(0, V, (B, T + more)).astype(np.int32)
    index = np.arange(T + more)
    positions = np.broadcast_to(CONFIG.position_offset + index, tokens.shape)
    past = template_of()
    ones = np.ones((B, PREFIX), bool)
    exists = np.concatenate([ones, index < (sizes + more)[:, None]], axis=1)
    route = index < sizes[:, None]
    whole = forward(tokens=tokens, positions=positions, mask=exists, past=past, bank=bank, route=route)

    mask = np.concatenate([ones, route[:, :T]], axis=1)
    step = forward(tokens=tokens[:, :T], positions=positions[:, :T], mask=mask, past=past, bank=bank)
    selection = step.selection
    close(step.document_scores, whole.document_scores)
    np.testing.assert_array_equal(selection.documents, whole.selection.documents)
    for b in range(B):
        close(step.hidden[b, : sizes[b]], whole.hidden[b, : sizes[b]])
    cache = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))), step.own)
    mask = np.pad(mask, ((0, 0), (0, more)))
    for i in range(more):
        slot, at = PREFIX + T + i, (sizes + i)[:, None]
        mask[:, slot] = True
        step = forward(
            tokens=np.take_along_axis(tokens, at, axis=1), positions=np.take_along_axis(positions, at, axis=1),
            mask=mask, past=cache, slot=jnp.int32(slot), bank=bank, selection=selection,
        )  # fmt: skip
        cache = KeyValues(k=step.own.k, v=step.own.v)
        close(step.hidden[:, 0], np.take_along_axis(np.asarray(whole.hidden), at[:, :, None], axis=1)[:, 0])
    assert step.document_scores is None


def test_a_template_prefix_equals_one_pass():
    tokens = np.concatenate([np.repeat(TEMPLATE, B, axis=0), TOKENS], axis=1)
    positions = np.concatenate([np.broadcast_to(np.arange(PREFIX, dtype=np.int32), (B, PREFIX)), POSITIONS], axis=1)
    whole = forward(tokens=tokens, positions=positions)
    rest = forward(past=template_of())
    close(rest.hidden, whole.hidden[:, PREFIX:])
    close(rest.own.k, whole.own.k)
    assert whole.document_scores is None and whole.selection is None


@jax.jit
def _layer_by_layer(split, tokens, positions, bank):
    """Input of every layer, and the scores, one block at a time."""
    model = nnx.merge(*split)
    x, inputs, scores = model.embed(tokens), [], []
    for (is_router, _, count), group in zip(model.config.layer_groups, model.groups, strict=True):
        graphdef, state = nnx.split(group)
        for i in range(count):
            block = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
            inputs.append(x)
            memory = dict(memory=bank.layer(len(scores)), return_scores=True) if is_router else {}
            x, result = block(x, positions=positions, **memory)
            scores += [result.document_scores] if is_router else []
    return jnp.stack([*inputs, model.final_norm(x)]), jnp.stack(scores)


def test_stacked_layers_equal_single_ones():
    model = model_of(num_layers=4, router_layers=(0, 2, 3))
    got = forward(model, bank=bank_of(3), return_hidden=True)
    hidden, scores = _layer_by_layer(nnx.split(model), TOKENS, POSITIONS, bank_of(3))
    close(got.all_hidden, hidden)
    close(got.document_scores, scores)
    np.testing.assert_array_equal(got.hidden, got.all_hidden[-1])


@pytest.mark.parametrize("layers", [(3,), (1,), (0, 1, 2, 3), (0, 2), None])
def test_any_layers_may_be_router_layers(layers):
    model = nnx.eval_shape(lambda: MSATransformer(CONFIG.replace(num_layers=4, router_layers=layers), rngs=nnx.Rngs(0)))
    count = len(layers) if layers else 2
    rows = jax.ShapeDtypeStruct((3, W), jnp.int32)

    def ask(state, rows, tokens):
        model = nnx.merge(graphdef, state)
        encoded = model.encode_documents(rows, segment_ids=rows, positions=rows, return_hidden=True)
        owners = jnp.arange(9)
        layout = DocumentLayout(owners, owners, owners, max_length=2)
        return encoded, model(tokens, positions=tokens, bank=model.bank(encoded.states, layout), return_scores=True)

    graphdef, state = nnx.split(model)
    encoded, output = jax.eval_shape(ask, state, rows, jax.ShapeDtypeStruct((B, T), jnp.int32))
    assert encoded.states.content_k.shape == (count, 9, 2, 6) and encoded.hidden.shape == (5, 3, W, 12)
    assert output.document_scores.shape == (count, B, 9) and output.selection.starts.shape == (count, B, 2)
    assert output.own.k.shape == (4, B, T, 2, 6)


def test_remat_changes_neither_values_nor_gradients():
    batch = pack_documents(DOCUMENTS, chunk_size=P, row_len=W)
    layout = DocumentLayout(batch.chunk_documents, batch.starts, batch.lengths, max_length=3)

    def loss(params, graphdef):
        model = nnx.merge(graphdef, params)
        states = model.encode_documents(
            batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions
        ).states
        output = model(TOKENS, positions=POSITIONS, bank=model.bank(states, layout), return_scores=True)
        return jnp.sum(jnp.sin(model.logits(output.hidden))) + jnp.sum(output.document_scores**2)

    def run(remat):
        graphdef, params = nnx.split(model_of(router_layers=(0, 1), remat=remat))
        traced = jax.jit(jax.value_and_grad(loss), static_argnums=1).trace(params, graphdef)
        compiled = traced.lower().compile({"xla_backend_optimization_level": 0})  # nearly all the time it takes
        return compiled(params), str(traced.jaxpr).count("remat")

    want, recomputed = run("none")
    # All parameters learn, those of documents and questions.
    assert recomputed == 0 and all(np.abs(g).max() > 0 for g in jax.tree.leaves(want[1]))
    for remat in ("dots", "full"):
        got, recomputed = run(remat)
        assert recomputed > 0
        for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_float32():
    kwargs = dict(top_k=N + 3)  # all documents, so that no choice hangs on rounding
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, bank_of())
    got, want = forward(model_of(**kwargs, dtype="bfloat16"), bank=half), forward(model_of(**kwargs), bank=bank_of())
    assert got.hidden.dtype == got.own.k.dtype == jnp.bfloat16 and got.document_scores.dtype == jnp.float32
    error = np.abs(got.hidden.astype(jnp.float32) - want.hidden)
    assert error.mean() < 0.02 and error.max() < 0.2
    np.testing.assert_allclose(got.document_scores, want.document_scores, atol=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_scores_against_the_output_embedding(tied):
    model, hidden = model_of(tie_embeddings=tied), np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
    table = model.embed.embedding[...] if tied else model.lm_head.kernel[...].T
    assert model.output_embedding.shape == (V, 12) and (model.lm_head is None) == tied
    close(model.logits(jnp.asarray(hidden)), hidden @ np.asarray(table).T, atol=1e-4)


@pytest.mark.parametrize("change", [{}, {"past": True}, {"past": True, "slot": 0}])
def test_a_mask_of_the_wrong_length_is_refused(change):
    want = {0: (B, T), 1: (B, T + PREFIX), 2: (B, PREFIX)}[len(change)]
    if "past" in change:
        zeros = np.zeros((2, 1, PREFIX, 2, 6), np.float32)
        change = change | dict(past=KeyValues(k=zeros, v=zeros))
    with pytest.raises(ValueError, match="MSATransformer: mask must be"):
        try:
            model_of()(TOKENS, positions=POSITIONS, mask=np.ones((B, 99), bool), **change)
        except ValueError as error:
            assert f"{want}, got {(B, 99)}" in str(error)
            raise
