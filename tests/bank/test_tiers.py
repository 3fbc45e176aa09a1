"""Content in host memory or on disk gives what content on the device gives, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax import MemoryBank, MemorySparseAttention, MSAConfig, MSATransformer
from msa_jax.bank.disk_content import DiskContent
from msa_jax.bank.loading import load
from msa_jax.bank.quantization import quantize
from msa_jax.context import Reuse, Route
from msa_jax.errors import BankError
from msa_jax.inference.programs import DecodeBatch, PrefillBatch, decode, prefill
from msa_jax.inference.sampling import from_settings
from msa_jax.inference.settings import Sampling
from msa_jax.inference.slots import Visibility, empty_slots
from msa_jax.memory import DocumentLayout, tiers
from msa_jax.memory.selection import Selection, bias_of
from msa_jax.routing import NO_SCORE
from tests.bank import drawn

B, T, V, N, LAYERS, HEADS, WIDTH = 3, 5, 41, 7, 2, 2, 6
LENGTHS = (3, 1, 2, 5, 1, 2, 3)
CONFIG = MSAConfig(
    vocab_size=V, hidden_size=12, num_layers=3, router_layers=(1, 2), num_heads=4, num_kv_heads=HEADS,
    head_dim=WIDTH, mlp_size=20, chunk_size=4, top_k_documents=3, position_offset=5, router_bias=True,
    router_bias_init=1.0,
)  # fmt: skip
TOKENS = np.random.default_rng(2).integers(0, V, (B, T)).astype(np.int32)


@functools.cache
def bank_of(int8=False):
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(N), LENGTHS)
    keys, k, v = (rng.normal(size=(LAYERS, len(owners), HEADS, WIDTH)).astype(np.float32) for _ in range(3))
    keys = (keys / np.linalg.norm(keys, axis=-1, keepdims=True)).reshape(LAYERS, len(owners), -1)
    bank = MemoryBank(*map(jnp.asarray, (keys, k, v)), DocumentLayout.from_chunk_documents(owners, N))
    return quantize(bank) if int8 else bank


class Arrays:
    """Reads content from arrays, and remembers what was asked of it."""

    def __init__(self, bank):
        self.k, self.v = (np.asarray(x) for x in (bank.content_k, bank.content_v))
        self.asked = []

    def read(self, layer, chunks):
        assert chunks.dtype == np.int64 and (np.diff(chunks) > 0).all()
        self.asked.append((layer, chunks.tolist()))
        return self.k[layer, chunks], self.v[layer, chunks]


def on_disk(bank, reader=None):
    content = tiers.stored(reader or Arrays(bank), bank.content_k.shape, bank.content_k.dtype)
    return bank.replace(content_k=None, content_v=None, stored=content)


PLACES = {"device": lambda bank: bank, "host": tiers.to_host, "disk": on_disk}


@functools.cache
def placed(place, int8=False):
    return PLACES[place](bank_of(int8))


off_device = pytest.mark.parametrize("place", ["host", "disk"])


@functools.cache
def model_of():
    rng = np.random.default_rng(1)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MSATransformer(CONFIG, rngs=nnx.Rngs(0))))
    draw = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    return graphdef, jax.tree.map(draw, state)


def forward(params, graphdef, read):
    model = nnx.merge(graphdef, params)
    output = model.prefill(TOKENS, read=read)
    return model.logits(output.hidden), output.document_scores, output.selection


_run = jax.jit(forward, static_argnames="graphdef")


def run(bank, visible=None, selection=None):
    graphdef, params = model_of()
    visible = np.ones((B, N), bool) if visible is None else visible
    read = Route(bank, visible=visible, want=("scores",)) if selection is None else Reuse(bank, selection)
    return _run(params, graphdef, read)


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(("place", "int8"), [("host", False), ("disk", False), ("host", True)])
def test_outputs_are_those_of_content_on_the_device(place, int8):
    bank, elsewhere = bank_of(int8), placed(place, int8)
    assert (bank.tier, elsewhere.tier) == ("device", place)
    visible = np.ones((B, N), bool)
    visible[1, 2:] = False  # fewer documents than are selected, so that a part selects nothing
    for kwargs in ({}, dict(visible=visible)):
        want = run(bank, **kwargs)
        equal(run(elsewhere, **kwargs), want)
    assert (np.asarray(want[2].lengths[:, 1]) == 0).any() and (np.asarray(want[2].lengths[:, 1]) > 0).any()


@off_device
@settings(max_examples=25)
@given(data=st.data())
def test_any_ranges_are_fetched_as_they_are(place, data):
    """Documents anywhere, the very end of the bank included, of any length up to the longest."""
    bank = bank_of()
    chunks, longest = bank.num_chunks, bank.layout.max_length
    lengths = data.draw(st.lists(st.integers(0, longest), min_size=4, max_size=4))
    starts = [data.draw(st.integers(0, chunks - n)) for n in lengths]
    starts, lengths = np.reshape(starts, (2, 2)).astype(np.int32), np.reshape(lengths, (2, 2)).astype(np.int32)
    layer = data.draw(st.integers(0, LAYERS - 1))
    content = _content_of(placed(place), jnp.int32(layer), starts, lengths)
    assert content.bank_k.shape == (4 * longest, HEADS, WIDTH)
    np.testing.assert_array_equal(content.lengths, lengths)
    for got, want in ((content.bank_k, bank.content_k), (content.bank_v, bank.content_v)):
        for i, j in np.ndindex(2, 2):
            first, n = int(content.starts[i, j]), int(lengths[i, j])
            there = np.asarray(got[first : first + n])
            np.testing.assert_array_equal(there, want[layer, starts[i, j] : starts[i, j] + n])


_content_of = jax.jit(lambda bank, layer, starts, lengths: tiers.content_of(bank.layer_at(layer), starts, lengths))


@pytest.mark.parametrize(("place", "int8"), [("host", False), ("disk", True)])
def test_what_is_fetched_once_serves_every_step_of_decoding(place, int8):
    bank = bank_of(int8)
    want, _, selection = run(bank)
    elsewhere = placed(place, int8)
    near, selected = jax.jit(tiers.fetch)(elsewhere, selection)
    assert near.tier == "device" and near.routing_keys is None
    assert near.num_chunks == B * CONFIG.top_k_documents * bank.layout.max_length
    got, scores, _ = run(near, selection=selected)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert scores is None
    with pytest.raises(ValueError, match=r"to route, routing_keys must be \[C, M\] = \(45, 12\), got None"):
        run(near)
    same, same_selection = tiers.fetch(bank, selection)
    assert same is bank and same_selection is selection


def test_decoding_reads_content_from_anywhere_and_once():
    graphdef, params = model_of()
    model = nnx.merge(graphdef, params)
    everything = Visibility(namespaces=jnp.zeros(bank_of().num_documents, jnp.int32), born=jnp.zeros(1, jnp.int32))
    batch = PrefillBatch(
        slots=np.arange(B)[::-1].astype(np.int32), tokens=TOKENS, lengths=np.full(B, T, np.int32),
        begin=np.zeros(B, np.int32), route=np.ones((B, T), bool), alone=np.ones(B, bool), allowed=np.ones((B, 1), bool),
        seen=np.zeros(B, np.int32), sampling=from_settings([Sampling()] * B),
    )  # fmt: skip

    def ask(bank):
        slots = empty_slots(model, None, bank, count=B, size=T + 6)
        slots, first = prefill(
            graphdef, params, None, slots, bank, everything, batch, fresh=True, routes=True, reported=2
        )
        now = DecodeBatch(
            token=np.asarray(first.token)[::-1], length=np.full(B, T, np.int32), left=np.full(B, 4, np.int32),
            sampling=from_settings([Sampling()] * B),
        )  # fmt: skip
        written = [first]
        for _ in range(2):
            slots, tokens = decode(graphdef, params, slots, bank, now, columns=T + 6, steps=2, stop_tokens=())
            now = now.replace(token=np.asarray(tokens)[:, -1], length=now.length + 2)
            written.append(tokens)
        return written

    equal(ask(placed("host")), ask(bank_of()))
    reader = Arrays(bank_of())
    equal(ask(on_disk(bank_of(), reader)), ask(bank_of()))
    # Every layer when the prompt is read, and once more for all tokens.
    assert sorted(layer for layer, _ in reader.asked) == [0, 0, 1, 1]


@off_device
@pytest.mark.parametrize(("chunks", "selected"), [(0, 3), (4, 0)])
def test_a_bank_without_chunks_or_without_documents(place, chunks, selected):
    arrays = (jnp.ones((LAYERS, chunks, *rest)) for rest in ((HEADS * WIDTH,), (HEADS, WIDTH), (HEADS, WIDTH)))
    layout = DocumentLayout.from_chunk_documents(np.full(chunks, selected), selected)
    nothing = jnp.zeros((LAYERS, B, selected), jnp.int32)
    selection = Selection(documents=nothing, scores=nothing + NO_SCORE, starts=nothing, lengths=nothing)
    near, selection = jax.jit(tiers.fetch)(PLACES[place](MemoryBank(*arrays, layout)), selection)
    assert near.num_chunks == 0 and not np.asarray(selection.lengths).any()
    first = jax.tree.map(lambda x: x[0], selection)
    assert not np.asarray(bias_of(first, jnp.ones((4,)))).any()


@off_device
def test_a_single_layer_without_jit(place):
    content = tiers.content_of(placed(place).layer(1), jnp.array([[4, 14]]), jnp.array([[2, 3]]))
    first = int(content.starts[0, 1])
    np.testing.assert_array_equal(content.bank_v[first : first + 3], bank_of().layer(1).content_v[14:17])


@off_device
def test_gradients_reach_the_layer_and_no_content_elsewhere(place):
    draw = np.random.default_rng(3).normal
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MemorySparseAttention(CONFIG, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: jnp.asarray(draw(0, 0.3, x.shape), x.dtype), state)
    x, positions = jnp.asarray(draw(size=(B, T, 12)), jnp.float32), jnp.broadcast_to(jnp.arange(T), (B, T))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), allow_int=True)
    def gradient(params, content_v, bank):
        memory = bank.replace(content_v=content_v).layer_at(jnp.int32(1))
        output = nnx.merge(graphdef, params)(x, positions=positions, memory=memory, return_scores=True)
        return jnp.sum(output.out**2) + jnp.sum(output.document_scores**2)

    banks = (bank_of(), placed(place))
    (want, near), (got, elsewhere) = (gradient(params, bank.content_v, bank) for bank in banks)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)
    assert np.asarray(near).any() and not any(np.asarray(x).any() for x in jax.tree.leaves(elsewhere))
    message = f"bank_gradients needs content on the device, this bank's is on the {place}"
    with pytest.raises(ValueError, match=message):
        graphdef, params = model_of()
        forward(params, graphdef, Route(placed(place), bank_gradients=True))


def test_the_disk_is_asked_for_the_selected_chunks_once_and_no_others():
    bank = bank_of()
    reader = Arrays(bank)
    elsewhere = on_disk(bank, reader)
    selection = run(elsewhere)[2]
    wanted = {
        layer: sorted({
            chunk
            for start, length in zip(starts.ravel(), lengths.ravel(), strict=True)
            for chunk in range(start, start + length)
        })
        for layer, (starts, lengths) in enumerate(
            zip(np.asarray(selection.starts), np.asarray(selection.lengths), strict=True)
        )
    }  # fmt: skip
    assert sorted(reader.asked) == sorted(wanted.items())
    assert any(len(chunks) < bank.num_chunks for chunks in wanted.values())


def test_another_bank_on_disk_is_read_by_what_is_compiled(compiled):
    bank = bank_of()
    other = bank.replace(content_k=-bank.content_k, content_v=2 * bank.content_v)
    first, second = on_disk(bank), on_disk(other)
    got = [run(first), run(second), run(first)]
    compiled.clear()
    equal(run(on_disk(other)), got[1])
    assert not compiled
    equal(got, [run(bank), run(other), run(bank)])


class Broken:
    def __init__(self, result):
        self.result = result

    def read(self, layer, chunks):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result, self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (OSError("the disk is gone"), "router layer 0 cannot be read from disk: the disk is gone"),
        (np.zeros((1, HEADS, WIDTH), np.float16), "router layer 0 .*: float32 .* was expected and float16"),
    ],
)
def test_a_failing_disk_is_one_exception_that_says_why(result, message):
    with pytest.raises(BankError, match=f"^content of {message}[^\n]*$"), tiers.content_errors():
        jax.block_until_ready(run(on_disk(bank_of(), Broken(result))))


def test_other_errors_stay_as_they_are():
    with pytest.raises(ValueError, match="^mine$"), tiers.content_errors():
        raise ValueError("mine")


@pytest.fixture
def store(tmp_path):
    """Thirty documents, some of them deleted, so that chunks do not stand in memory where they stand on disk."""
    with drawn.create(tmp_path / "bank") as store:
        drawn.put(store, {f"{i}": f"text {i}" for i in range(1, 6)})
        drawn.put(store, {f"{i}": f"other text {i % 5 + 1}-{i % 3 + 1}" for i in range(6, 31)})
        store.delete(["2", "7", "8", "20"])
        yield store


def left_on_disk(loaded, store):
    content = DiskContent(store, loaded.placement.source).stored()
    return loaded.bank.replace(content_k=None, content_v=None, stored=content)


def test_a_bank_left_in_its_store_is_the_bank_that_is_loaded(store):
    loaded = load(store)
    elsewhere = left_on_disk(loaded, store)
    elsewhere.check()
    store.delete(["30"])  # a reader stays at its version
    layout, documents = loaded.bank.layout, np.flatnonzero(np.asarray(loaded.bank.layout.lengths))
    starts, lengths = (np.asarray(x)[documents][None] for x in (layout.starts, layout.lengths))
    for layer in range(drawn.L):
        near = _content_of(elsewhere, jnp.int32(layer), starts, lengths)
        for first, start, n in zip(np.asarray(near.starts)[0], starts[0], lengths[0], strict=True):
            for got, want in ((near.bank_k, loaded.bank.content_k), (near.bank_v, loaded.bank.content_v)):
                np.testing.assert_array_equal(got[first : first + n], want[layer, start : start + n])


def test_a_damaged_store_is_named(store):
    loaded = load(store)
    elsewhere = left_on_disk(loaded, store)
    for file in store.path.rglob("d/*"):
        file.unlink()
    with pytest.raises(BankError, match=f"^content of router layer 1 cannot .* disk: {store.path}: NOT_FOUND"):
        with tiers.content_errors():
            ranges = np.array([[0]]), np.array([[2]])
            jax.block_until_ready(_content_of(elsewhere, jnp.int32(1), *ranges))


def test_what_cannot_be_is_refused():
    bank = bank_of()
    elsewhere = on_disk(bank)
    for broken in (bank.replace(content_k=None), elsewhere.replace(content_v=bank.content_v)):
        with pytest.raises(ValueError, match="MemoryBank: content_k and content_v, or `stored` and neither of them"):
            run(broken)
    with pytest.raises(ValueError, match="LayerMemory: content_k and content_v, or `stored`"):
        elsewhere.layer(0).replace(index=None).check()
    with pytest.raises(ValueError, match=r"content_k must be \[L_r, C, K, D\] = \(2, 17, 2, 6\), got \(2, 16, 2, 6\)"):
        run(bank.replace(content_k=None, content_v=None, stored=tiers.stored(Arrays(bank), (2, 16, 2, 6), "float32")))
    with pytest.raises(ValueError, match="content_k of int8 without content_k_scale"):
        run(bank.replace(content_k=None, content_v=None, stored=tiers.stored(Arrays(bank), (2, 17, 2, 6), "int8")))
    with pytest.raises(ValueError, match="to_host: the content is on disk"):
        tiers.to_host(elsewhere)
    for tier in ("host", "disk"):
        with pytest.raises(ValueError, match=f"quantize: content must be on the device, this bank's is on the {tier}"):
            quantize(placed(tier))


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_several_devices_are_refused():
    mesh = jax.make_mesh((2,), ("memory",))
    sharding = jax.NamedSharding(mesh, jax.P(None, "memory"))
    bank = bank_of()
    content = jax.device_put(np.zeros((LAYERS, 18, HEADS, WIDTH), np.float32), sharding)
    with pytest.raises(ValueError, match="Content on the host serves one device, and this bank is on 2"):
        tiers.to_host(bank.replace(content_k=content))
    tiers.require_one_device(sharding, "device")
