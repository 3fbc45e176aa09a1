"""The model: decoding against one pass, stacks against single layers, remat, dtypes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax import MemoryBank, MSAConfig, MSATransformer
from msa_jax.context import Context, Resume, Reuse, Route
from msa_jax.data.batch import pack_documents
from msa_jax.memory import DocumentLayout

B, T, V, N, P, W, PREFIX = 2, 6, 37, 5, 4, 12, 3
SCORES = ("scores",)
CONFIG = MSAConfig(
    vocab_size=V, hidden_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_size=20, chunk_size=P,
    top_k_documents=2, position_offset=5, tie_embeddings=False,
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


@functools.partial(jax.jit, static_argnames=("graphdef", "verb", "static"))
def _said(graphdef, params, verb, args, kwargs, static):
    return getattr(nnx.merge(graphdef, params), verb)(*args, **kwargs, **dict(static))


def say(verb, *args, model=None, static=(), **kwargs):
    """What a verb of the model gives, compiled."""
    return jax.device_get(_said(*nnx.split(model or model_of()), verb, args, kwargs, static))


def prefill(tokens=TOKENS, **kwargs):
    return say("prefill", tokens, **kwargs)


@functools.cache
def template_of():
    return say("encode_template", TEMPLATE)


def close(got, want, atol=2e-5):
    np.testing.assert_allclose(got, want, atol=atol)


@functools.cache
def room():
    return jax.jit(lambda split, template: nnx.merge(*split).cache(B, PREFIX + T + 5, template))(
        nnx.split(model_of()), template_of()
    )


add = jax.jit(Context.add)


@settings(max_examples=8)
@given(data=st.data())
def test_prefill_then_decode_and_then_extend_equal_one_pass(data):
    """Prompts of any lengths, padded at the end, then tokens one by one, of some questions only, then several."""
    bank, ones = bank_of(), st.lists(st.integers(1, T), min_size=B, max_size=B)
    sizes = np.array(data.draw(ones), np.int32)
    writes = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=B, max_size=B), min_size=2, max_size=2)))
    more = np.array(data.draw(st.lists(st.integers(1, 3), min_size=B, max_size=B)), np.int32)
    tokens = np.random.default_rng(3).integers(0, V, (B, T + 5)).astype(np.int32)
    route = np.arange(T + 5)[None] < sizes[:, None]
    lengths = sizes + writes.sum(0) + more
    whole = prefill(tokens, lengths=lengths, template=template_of(), read=Route(bank, route, want=SCORES))

    first = prefill(tokens[:, :T], lengths=sizes, template=template_of(), read=Route(bank, want=SCORES))
    close(first.document_scores, whole.document_scores)
    np.testing.assert_array_equal(first.selection.documents, whole.selection.documents)
    for b in range(B):
        close(first.hidden[b, : sizes[b]], whole.hidden[b, : sizes[b]])
    context, read, at = add(room(), first.own, sizes), Reuse(bank, first.selection), sizes.copy()
    for write in writes:
        hidden, context = say("decode", tokens[range(B), at], context, write=write, read=read)
        close(hidden[write], whole.hidden[write, at[write]])
        at += write
    np.testing.assert_array_equal(context.length, at + PREFIX)
    rest = np.stack([tokens[b, at[b] : at[b] + 3] for b in range(B)])
    last = say("extend", rest, context, lengths=more, read=read)
    for b in range(B):
        close(last.hidden[b, : more[b]], whole.hidden[b, at[b] : at[b] + more[b]])
    assert last.document_scores is None
    context = add(context, last.own, more)
    for b in range(B):
        close(context.past.k[:, b, PREFIX : context.length[b]], whole.own.k[:, b, : lengths[b]])


@settings(max_examples=8)
@given(split=st.lists(st.integers(1, T - 1), min_size=B, max_size=B), seed=st.integers(0, 3))
def test_resuming_over_a_cache_equals_prefill_of_the_whole(split, seed):
    """As long as what the first tokens read is what all of them select: `same` says whether it is."""
    bank, sizes = bank_of(), np.array(split, np.int32)
    tokens = np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)
    whole = prefill(tokens, template=template_of(), read=Route(bank))
    first = prefill(tokens, lengths=sizes, template=template_of(), read=Route(bank))
    context = add(room(), first.own, sizes)
    rest = np.stack([np.pad(tokens[b, sizes[b] :], (0, sizes[b])) for b in range(B)])
    # The second of two layers is the router, and the last: what it reads concerns no key of another token.
    read = Resume(bank, selection=first.selection, also=first.selection)
    got = say("extend", rest, context, lengths=T - sizes, read=read)
    assert np.asarray(got.same).all()
    np.testing.assert_array_equal(got.selection.documents, whole.selection.documents)
    close(got.selection.scores, whole.selection.scores)
    for b in range(B):
        close(got.hidden[b, : T - sizes[b]], whole.hidden[b, sizes[b] :])


def test_a_template_prefix_equals_one_pass():
    tokens = np.concatenate([np.repeat(TEMPLATE, B, axis=0), TOKENS], axis=1)
    positions = np.concatenate([np.broadcast_to(np.arange(PREFIX, dtype=np.int32), (B, PREFIX)), POSITIONS], axis=1)
    whole = prefill(tokens, positions=positions)
    rest = prefill(template=template_of())
    close(rest.hidden, whole.hidden[:, PREFIX:])
    close(rest.own.k, whole.own.k[:, :, PREFIX:])
    assert whole.document_scores is None and whole.selection is None
    assert say("encode_template", TEMPLATE[:, :0]) is None  # nothing stands before nothing


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
    got = prefill(model=model, read=Route(bank_of(3), want=SCORES), static=(("return_hidden", True),))
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
        return encoded, model.prefill(tokens, read=Route(model.bank(encoded.states, layout), want=SCORES))

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
        output = model.prefill(TOKENS, read=Route(model.bank(states, layout), want=SCORES))
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
    kwargs = dict(top_k_documents=N + 3)  # all documents, so that no choice hangs on rounding
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, bank_of())
    got = prefill(model=model_of(**kwargs, dtype="bfloat16"), read=Route(half, want=SCORES))
    want = prefill(model=model_of(**kwargs), read=Route(bank_of(), want=SCORES))
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


@pytest.mark.parametrize("verb", ["prefill", "extend"])
def test_lengths_of_another_number_of_questions_are_refused(verb):
    context = (room(),) if verb == "extend" else ()
    with pytest.raises(ValueError, match=r"MSATransformer: lengths must be \[B\] = \(2,\), got \(3,\)"):
        getattr(model_of(), verb)(TOKENS, *context, lengths=np.ones(3, np.int32))
