"""Encoding documents, and what may not change an answer: packing, order, room, documents that are not read."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msa_jax import MemoryBank, MSAConfig, MSATransformer
from msa_jax.bank.encoder import RowEncoder, _encode_rows, encode_bank
from msa_jax.context import Route
from msa_jax.data.batch import pack_documents
from msa_jax.memory import DocumentLayout

B, T, V, N, P = 2, 6, 37, 5, 4
CONFIG = MSAConfig(
    vocab_size=V, hidden_size=12, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_size=20, chunk_size=P,
    top_k_documents=2, position_offset=5, router_layers=(1, 2), router_bias=True, router_bias_init=3.0,
)  # fmt: skip
RNG = np.random.default_rng(0)
LENGTHS = (9, 3, 12, 4, 7)  # 3, 1, 3, 1 and 2 chunks
DOCUMENTS = [RNG.integers(0, V, n) for n in LENGTHS]
TOKENS = RNG.integers(0, V, (B, T)).astype(np.int32)
POSITIONS = np.broadcast_to(CONFIG.position_offset + np.arange(T, dtype=np.int32), (B, T))
# Room for more documents and chunks than there are, with NaN in all that is unused.
ROOM_N, ROOM_C = 8, 19


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
def bank_of():
    return encode_bank(model_of(), pack_documents(DOCUMENTS, chunk_size=P, row_len=12), rows_per_step=2)


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef, params, bank, visible):
    return nnx.merge(graphdef, params).prefill(TOKENS, read=Route(bank, visible=visible, want=("scores",)))


def forward(bank, visible, model=None):
    return _forward(*nnx.split(model or model_of()), bank, visible)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-5)


def chunks_of(bank, document):
    start, length = int(bank.layout.starts[document]), int(bank.layout.lengths[document])
    assert (bank.layout.chunk_documents[start : start + length] == document).all()
    return [x[:, start : start + length] for x in (bank.routing_keys, bank.content_k, bank.content_v)]


@functools.partial(jax.jit, static_argnames="graphdef")
def _encode_alone(graphdef, params, tokens, segments):
    model = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    states = model.encode_documents(tokens, segment_ids=segments, positions=positions).states
    bank = model.bank(states, DocumentLayout(None, None, None, max_length=3))
    return bank.routing_keys, bank.content_k, bank.content_v


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    shape=st.sampled_from([(12, 2), (24, 3)]),
    order=st.randoms(use_true_random=False),
    spare=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_any_packing_gives_the_same_bank(lengths, shape, order, spare, seed):
    """Each document's chunks are those of the document encoded alone, whatever it shares rows and steps with."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, V, n) for n in lengths]
    shuffled = order.sample(range(len(lengths)), len(lengths))
    width, rows = shape
    packed = pack_documents(
        [documents[i] for i in shuffled],
        chunk_size=P, row_len=width, num_documents=len(lengths) + spare, pad_id=seed % V,
    )  # fmt: skip
    bank = encode_bank(model_of(), packed, rows_per_step=rows)
    sizes = [-(-n // P) for n in lengths]
    assert bank.num_chunks == sum(sizes) and bank.num_documents == len(lengths) + spare
    assert bank.layout.max_length == max(sizes) and not np.any(bank.layout.lengths[len(lengths) :])
    tokens, exists = np.zeros((6, 12), np.int32), np.arange(12) < np.array(lengths + [0] * (6 - len(lengths)))[:, None]
    tokens[exists] = np.concatenate(documents)
    alone = _encode_alone(*nnx.split(model_of()), tokens, exists.astype(np.int32))
    for place, document in enumerate(shuffled):
        want = slice(3 * document, 3 * document + sizes[document])
        for got, field in zip(chunks_of(bank, place), alone, strict=True):
            close(got, field[:, want])


def test_a_bank_has_unit_routing_keys_in_the_compute_dtype():
    packed = pack_documents(DOCUMENTS, chunk_size=P, row_len=12)
    half = encode_bank(model_of(dtype="bfloat16"), packed, rows_per_step=2)
    names = ("routing_keys", "content_k", "content_v")
    for name in names:
        got, want = getattr(half, name), getattr(bank_of(), name)
        assert got.dtype == jnp.bfloat16 and want.dtype == jnp.float32 and got.shape == want.shape
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.15)
    assert half.nbytes * 2 == bank_of().nbytes == sum(getattr(bank_of(), name).size * 4 for name in names)
    keys = np.asarray(bank_of().routing_keys).reshape(2, -1, 2, 6)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1, atol=1e-5)


def test_a_bank_without_documents():
    packed = pack_documents([], chunk_size=P, row_len=12, num_rows=2, num_documents=N)
    bank = encode_bank(model_of(), packed, rows_per_step=2)
    assert (bank.num_chunks, bank.num_documents, bank.layout.max_length) == (0, N, 1)
    got = forward(bank, np.ones((B, N), bool))
    assert not np.any(got.selection.lengths)
    alone = jax.jit(lambda split: nnx.merge(*split).prefill(TOKENS).hidden)(nnx.split(model_of()))
    close(got.hidden, alone)


@pytest.mark.parametrize("chunk", [2, 6, 5])
def test_documents_packed_for_another_chunk_size_are_refused(chunk):
    packed = pack_documents([np.arange(5)], chunk_size=chunk, row_len={2: 12, 5: 10, 6: 12}[chunk])
    with pytest.raises(ValueError, match=r"encode_bank: rows of \d+ tokens .* were not packed .* chunk size 4; pack"):
        encode_bank(model_of(), packed)


def rearranged(order, numbers, gaps, added=()):
    """The bank with documents stored in another order under other numbers, gaps between them, more room.

    Documents `added` score 0 for every question and hold large content.
    """
    bank = bank_of()
    owners = np.full(ROOM_C, ROOM_N, np.int32)
    source = (bank.routing_keys, bank.content_k, bank.content_v)
    arrays = [np.full((x.shape[0], ROOM_C, *x.shape[2:]), np.nan, np.float32) for x in source]
    cursor = 0
    for document, gap in zip(order, gaps, strict=True):
        cursor += gap
        start, length = int(bank.layout.starts[document]), int(bank.layout.lengths[document])
        owners[cursor : cursor + length] = numbers[document]
        for mine, theirs in zip(arrays, source, strict=True):
            mine[:, cursor : cursor + length] = theirs[:, start : start + length]
        cursor += length
    for place, document in zip(range(ROOM_C - 1, cursor, -1), added, strict=False):
        owners[place] = document
        for mine, value in zip(arrays, (0.0, 100.0, 100.0), strict=True):
            mine[:, place] = value
    layout = DocumentLayout.from_chunk_documents(owners, ROOM_N).replace(max_length=4)
    return MemoryBank(*arrays, layout=layout)


@settings(max_examples=12)
@example(order=[4, 2, 0, 1, 3], numbers=[7, 2, 0, 5, 1, 3, 4, 6], gaps=[1, 0, 1, 0, 1], visible=[True] * (B * N))
@given(
    order=st.permutations(range(N)),
    numbers=st.permutations(range(ROOM_N)),
    gaps=st.lists(st.integers(0, 1), min_size=N, max_size=N),
    visible=st.lists(st.booleans(), min_size=B * N, max_size=B * N),
)
def test_order_numbers_capacity_and_documents_never_selected_change_nothing(order, numbers, gaps, visible):
    visible = np.array(visible).reshape(B, N)
    want = forward(bank_of(), visible)
    seen = np.zeros((B, ROOM_N), bool)
    seen[:, numbers[:N]] = visible
    # Two documents more are seen but never the best, unless fewer than k others score above 0.
    enough = (np.sort(want.document_scores, axis=-1)[..., -CONFIG.top_k_documents] > 0).all()
    assert enough or not visible.all()
    seen[:, numbers[N : N + 2]] = enough
    got = forward(rearranged(order, numbers, gaps, added=numbers[N : N + 2]), seen)
    close(got.hidden, want.hidden)
    np.testing.assert_allclose(got.document_scores[:, :, numbers[:N]], want.document_scores, atol=1e-5)
    found = np.asarray(want.selection.lengths) > 0
    np.testing.assert_array_equal(
        np.where(found, got.selection.documents, -1),
        np.where(found, np.array(numbers)[np.asarray(want.selection.documents)], -1),
    )


@settings(max_examples=12)
@given(hidden=st.sets(st.integers(0, N - 1)))
def test_a_document_that_is_not_visible_has_no_influence(hidden):
    """Not even NaN in it reaches question 0, though question 1 reads it; nor do both miss a deleted one."""
    bank, gone = bank_of(), np.isin(np.arange(N), list(hidden))
    visible = np.stack([~gone, np.ones(N, bool)])
    chunk = gone[np.asarray(bank.layout.chunk_documents)]
    poisoned = jax.tree.map(
        lambda x: np.where(chunk.reshape(-1, *[1] * (x.ndim - 2)), np.nan, x) if x.ndim > 1 else x, bank
    )
    want, got = forward(bank, visible), forward(poisoned, visible)
    np.testing.assert_array_equal(got.hidden[0], want.hidden[0])
    if hidden:
        assert np.isnan(got.document_scores[0, 1]).any() and np.isfinite(want.hidden).all()
    deleted = poisoned.replace(layout=bank.layout.replace(lengths=np.where(gone, 0, bank.layout.lengths)))
    close(forward(deleted, np.ones((B, N), bool)).hidden[0], want.hidden[0])


def test_more_documents_allowed_than_seen_moves_no_position():
    """k may differ from training: positions come from `position_offset`."""
    visible = np.eye(N, dtype=bool)[[2, 0]]
    many = model_of(top_k_documents=N + 3)
    assert many.config.position_offset == CONFIG.position_offset
    close(forward(bank_of(), visible, many).hidden, forward(bank_of(), visible).hidden)


def test_rows_are_spread_over_the_devices_and_none_waits_for_another():
    encoder = RowEncoder(model_of())
    rows = np.zeros((4, 12), np.int32)
    arrays = jax.device_put([rows] * 3, encoder._by_row)
    compiled = _encode_rows.lower(encoder._graphdef, encoder._params, *arrays).compile()
    assert jax.local_device_count() == 2 and len(arrays[0].sharding.device_set) == 2
    assert all(len(s.device_set) == 2 and not s.is_fully_replicated for s in jax.tree.leaves(compiled.output_shardings))
    assert not re.search(r"all-(gather|reduce|to-all)|collective", compiled.as_text())
