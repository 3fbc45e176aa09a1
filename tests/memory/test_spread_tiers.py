"""Content off the devices of a bank that is spread over them: each fetches its own part, and outputs are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from msa_jax import MSAConfig, MSATransformer
from msa_jax.bank.quantization import quantize
from msa_jax.context import Route
from msa_jax.memory import DocumentLayout, MemoryBank, tiers
from msa_jax.memory.selection import Selection
from msa_jax.sharding import MeshConfig, Shardings

LAYERS, CHUNKS, DOCUMENTS, TOKENS = 2, 11, 5, 7  # chunks and documents of a device
CONFIG = MSAConfig(
    vocab_size=48, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=24, chunk_size=4,
    top_k_documents=4, router_layers=(1, 2),
)  # fmt: skip


class Reader:
    """Content in arrays, and which chunks were read of it."""

    def __init__(self, bank):
        self.k, self.v, self.chunks = np.asarray(bank.content_k), np.asarray(bank.content_v), set()

    def read(self, layer, chunks):
        self.chunks |= set(chunks.tolist())
        return self.k[layer, chunks], self.v[layer, chunks]


def make_bank(int8):
    rng = np.random.default_rng(3)
    lengths = np.array([3, 1, 2, 0, 2, 2, 3, 1, 3, 0], np.int32)
    starts = np.array([0, 3, 4, 0, 8, 11, 14, 17, 19, 0], np.int32)
    owners = np.full(2 * CHUNKS, 2 * DOCUMENTS, np.int32)
    for document, (first, length) in enumerate(zip(starts, lengths, strict=True)):
        owners[first : first + length] = document
    normal = lambda *shape: jnp.asarray(rng.normal(size=(LAYERS, 2 * CHUNKS, *shape)), jnp.float32)  # noqa: E731
    layout = DocumentLayout(*map(jnp.asarray, (owners, starts, lengths)), max_length=3)
    bank = MemoryBank(normal(16), normal(2, 8), normal(2, 8), layout)
    return quantize(bank) if int8 else bank


def spread(bank, mesh, tier):
    axes = Shardings.inference().bank
    at = lambda x, *spec: None if x is None else jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    parts = {name: at(getattr(bank.layout, name), axes) for name in ("chunk_documents", "starts", "lengths")}
    scales = {name: at(getattr(bank, name), None, None, axes) for name in ("content_k_scale", "content_v_scale")}
    content = {name: at(getattr(bank, name), None, axes) for name in ("content_k", "content_v")}
    stored = None
    if tier == "disk":
        stored = tiers.stored(Reader(bank), bank.content_k.shape, bank.content_k.dtype)
        content = dict.fromkeys(content)
    result = MemoryBank(
        at(bank.routing_keys, None, axes), **content, **scales, key_scale=at(bank.key_scale, None, axes),
        layout=DocumentLayout(**parts, max_length=3, axes=axes), stored=stored,
    )  # fmt: skip
    return tiers.to_host(result) if tier == "host" else result


@pytest.fixture(scope="module")
def ask():
    graphdef, state = nnx.split(MSATransformer(CONFIG, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(5).integers(1, 48, size=(2, TOKENS)), jnp.int32)

    @jax.jit
    def step(state, bank):
        output = nnx.merge(graphdef, state).prefill(tokens, read=Route(bank))
        return output.hidden, output.selection.documents

    return lambda bank: jax.device_get(step(state, bank))


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_each_device_fetches_its_own_part(ask, tier, int8):
    bank = make_bank(int8)
    hidden, documents = ask(bank)
    mesh = MeshConfig(data=1, memory=2).make(jax.devices()[:2])
    with jax.set_mesh(mesh):
        moved = spread(bank, mesh, tier)
        assert moved.tier == tier
        got, selected = ask(moved)
    np.testing.assert_array_equal(selected, documents)
    assert documents.min() < DOCUMENTS <= documents.max()  # of both devices
    np.testing.assert_allclose(got, hidden, atol=2e-5)
    if tier == "disk":
        owners = np.asarray(bank.layout.chunk_documents)
        assert moved.stored.source.reader.chunks == set(np.flatnonzero(np.isin(owners, documents)).tolist())


def test_what_a_spread_bank_cannot_do_is_refused():
    bank = make_bank(False)
    mesh = MeshConfig(data=1, memory=2).make(jax.devices()[:2])
    ranges = jnp.zeros((LAYERS, 1, 1), jnp.int32)
    selection = Selection(documents=ranges, scores=ranges * 1.0, starts=ranges, lengths=ranges)
    with pytest.raises(ValueError, match="fetch: this bank is spread over the mesh axes memory, model"):
        tiers.fetch(spread(bank, mesh, "host"), selection)
    without_axes = spread(bank, mesh, "device")
    with pytest.raises(ValueError, match="this bank is on 2"):
        tiers.to_host(without_axes.replace(layout=bank.layout))
