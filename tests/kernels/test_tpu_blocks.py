"""How the TPU kernels cut their work: blocks fit in VMEM, tables point at what they should, cores share the steps."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import chunk_scores, dispatch, gather_attention
from pallas_kernels.chunk_scores import config as routing_config
from pallas_kernels.gather_attention import config, tpu, tpu_owners, tpu_stream
from tests.kernels.implementations import running
from tests.kernels.test_gather_attention_contract import make

MIB = 2**20
sizes = st.sampled_from([1, 2, 4])


@given(st.integers(1, 64), st.integers(1, 512), st.integers(1, 3000), st.integers(1, 2048), sizes, sizes)
def test_blocks_of_routing_cover_the_questions_and_fit(b, t, c, m, query_bytes, key_bytes):
    blocks = routing_config.choose(b, t, c, m, query_bytes, key_bytes, 48 * MIB)
    assert blocks.vmem_bytes(m, query_bytes, key_bytes) <= 48 * MIB
    assert blocks.tokens >= t and blocks.rows % 8 == 0
    assert blocks.tile == c or (blocks.tile < c and blocks.tile % 128 == 0)
    assert routing_config.choose(b, t, c, m, query_bytes, key_bytes, 1 * 1024) is None


heads = st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 256))


@given(st.integers(1, 600), st.integers(0, 900), heads, st.integers(1, 400))
def test_blocks_of_attention_cover_the_queries_and_fit(t, more, heads, longest):
    group, kv, d = heads
    blocks = config.choose(t, t + more, group, kv, d, longest, 4, 4, 96 * MIB)
    assert blocks.vmem_bytes(kv, d, 4, 4) <= 96 * MIB
    count = -(-t // blocks.tokens)
    assert blocks.rows % 16 == 0 and (count - 1) * blocks.tokens < t
    assert blocks.own % 128 == 0


@st.composite
def many_ranges(draw):
    """starts, lengths [B, k] of any ranges in 90 rows."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=6, max_size=6))
    starts = [draw(st.integers(0, 90 - n)) for n in lengths]
    return np.array(starts, np.int32).reshape(2, 3), np.array(lengths, np.int32).reshape(2, 3)


@given(many_ranges())
def test_documents_with_chunks_come_first_in_their_order(ranges):
    starts, lengths = ranges
    operands = SimpleNamespace(starts=jnp.asarray(starts), lengths=jnp.asarray(lengths), layer=None)
    tables = jax.device_get(tpu_stream.tables(operands))
    for b in range(2):
        filled = np.flatnonzero(lengths[b] > 0)
        assert tables.counts[b] == len(filled)
        listed = slice(3 * b, 3 * b + len(filled))
        np.testing.assert_array_equal(tables.documents[listed], filled)
        np.testing.assert_array_equal(tables.starts[listed], starts[b, filled])
        np.testing.assert_array_equal(tables.lengths[listed], lengths[b, filled])


@given(many_ranges(), st.sampled_from([7, 32, 90]))
def test_every_tile_meets_all_ranges_that_touch_it(ranges, tile):
    starts, lengths = ranges
    tiles = -(-90 // tile)
    spans = jax.device_get(tpu_owners.ranges(jnp.asarray(starts), jnp.asarray(lengths), tile, tiles))
    for i in range(tiles):
        met = spans.origins[spans.first[i] : spans.last[i]]
        begin, end = i * tile, (i + 1) * tile
        for origin in range(6):
            start, length = starts.reshape(-1)[origin], lengths.reshape(-1)[origin]
            if length and start < end and start + length > begin:
                assert origin in met
        # No more than the longest overlap makes it.
        assert all(lengths.reshape(-1)[origin] > 0 for origin in met)


def test_two_cores_share_the_steps(monkeypatch):
    args = {n: jnp.concatenate([x, x[:1]]) if n in ("q", "k", "v", "mask", "starts", "lengths", "bias") else x
            for n, x in make("several blocks of queries").items()}  # fmt: skip
    call = functools.partial(gather_attention, implementation="tpu", **args)
    with running("tpu"):
        want = jax.device_get(call())
        monkeypatch.setattr(tpu, "_cores", lambda: 2)
        jax.clear_caches()
        got = jax.device_get(call())
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


def test_a_mesh_of_several_devices_needs_shard_map():
    query, keys = jnp.ones((2, 3, 16)), jnp.ones((5, 16))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    score = functools.partial(chunk_scores, implementation="tpu")
    specs = dict(in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"), check_vma=False)
    with running("tpu"), jax.set_mesh(mesh):
        with pytest.raises(NotImplementedError, match="over the mesh axes data: call it within jax.shard_map"):
            jax.eval_shape(score, query, keys)
        np.testing.assert_allclose(jax.jit(jax.shard_map(score, **specs))(query, keys), 16.0)


def test_tables_beyond_scalar_memory_are_refused():
    operands = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in make("plain").items() if n != "max_length"}
    wide = dict(starts=(2, 40_000), lengths=(2, 40_000), bias=(2, 40_000, 4))
    args = operands | {n: jax.ShapeDtypeStruct(shape, operands[n].dtype) for n, shape in wide.items()}
    with running("tpu"), pytest.raises(NotImplementedError, match="bytes of SMEM"):
        jax.eval_shape(lambda args: gather_attention(**args, implementation="tpu"), args)


def test_a_default_that_no_kernel_runs_goes_to_xla_and_says_why_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "device", lambda: ("tpu", "TPU v5 lite"))
    args = {n: x.astype(jnp.float16) if n in ("q", "k", "v") else x for n, x in make("plain").items()}
    with caplog.at_level("WARNING"):
        for _ in range(2):
            gather_attention(**args)
    said = [r.getMessage() for r in caplog.records if "'xla' does" in r.getMessage()]
    assert len(said) == 1 and "float16" in said[0]
