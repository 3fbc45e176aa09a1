"""Content on the device, in host memory and on disk: what a chip holds, and how long a question takes.

    python -m benchmarks.tiers compiled [--chips v5e,v5p,v6e]
    python -m benchmarks.tiers latency [--tokens 1048576]

`compiled`: the question step of the 4B model compiled ahead of time for TPUs that are not here (`make tpu`), with the
bytes of its arguments on the chip and on the host, and of its temporaries.

`latency`: milliseconds that a question and a decoded token take here, of a small model with random parameters and a
bank of random chunks, written to a folder for the purpose. Both write their part of benchmarks/results/tiers.json
(`--out`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import tempfile

from benchmarks import tiers_compiled  # before JAX, whose platform it sets
from benchmarks.measure import environment, median_seconds, write_json

import jax  # noqa: E402  isort: skip
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from msa_jax.bank import BankDocument, BankSpec, MemoryStore, load  # noqa: E402
from msa_jax.bank.change import Encoded  # noqa: E402
from msa_jax.bank.manifest import fingerprint_of  # noqa: E402
from msa_jax.config import MSAConfig  # noqa: E402
from msa_jax.context import Reuse, Route  # noqa: E402
from msa_jax.memory import tiers  # noqa: E402
from msa_jax.model import MSATransformer  # noqa: E402

CHUNK, TOP_K, CHUNKS_EACH, T = 16, 16, 8, 64


def random_bank(folder: pathlib.Path, config: MSAConfig, model: MSATransformer, tokens: int):
    """A bank on disk of random chunks."""
    rng, chunks = np.random.default_rng(0), tokens // CHUNK
    spec = BankSpec(
        fingerprint=fingerprint_of(model), text="no text", chunk_size=CHUNK, layers=len(config.router_layers),
        width=config.router_width, kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=config.dtype,
    )  # fmt: skip
    store = MemoryStore.create(folder, spec)
    layers, step = len(config.router_layers), 1 << 14
    for first in range(0, chunks, step):
        shape = (layers, min(step, chunks - first), config.num_kv_heads, config.head_dim)
        keys, k, v = (rng.standard_normal(shape, np.float32) for _ in range(3))
        keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
        count = shape[1] // CHUNKS_EACH
        lengths = np.full(count, CHUNKS_EACH)
        documents = [BankDocument(f"{first} {i}", f"text {first} {i}") for i in range(count)]
        ordinals = store.manifest.next_text + np.arange(count)
        encoded = Encoded(keys.reshape(*shape[:2], -1), k, v, lengths, lengths * CHUNK, ordinals, ordinals)
        store.append(documents, encoded, range(count))
    return store


def latency(tokens: int, repeats: int) -> dict:
    """Median milliseconds of a question and of a token by where content is."""
    config = MSAConfig.preset("tiny", chunk_size=CHUNK, top_k_documents=TOP_K)
    model = MSATransformer(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    rng = np.random.default_rng(1)
    questions = [jnp.asarray(rng.integers(0, config.vocab_size, (1, T)), jnp.int32) for _ in range(16)]

    @jax.jit
    def ask(params, tokens, bank):
        model = nnx.merge(graph, params)
        output = model.prefill(tokens, read=Route(bank))
        return output.hidden, model.cache(1, T + 1).add(output.own), output.selection

    @jax.jit
    def token(params, context, bank, selection):
        return nnx.merge(graph, params).decode(jnp.zeros(1, jnp.int32), context, read=Reuse(bank, selection))[0]

    fetch = jax.jit(tiers.fetch)
    with tempfile.TemporaryDirectory() as folder:
        store = random_bank(pathlib.Path(folder) / "bank", config, model, tokens)
        loaded = {name: load(store, content=name) for name in ("device", "host", "disk")}
        banks = {name: each.bank for name, each in loaded.items()}
        _, context, selection = ask(params, questions[0], banks["device"])
        each = {name: iter(questions * (repeats + 1)) for name in banks}
        forms = {f"question, {name}": lambda name=name: ask(params, next(each[name]), banks[name]) for name in banks}
        near, selected = fetch(banks["disk"], selection)
        decoding = {name: (bank, selection) for name, bank in banks.items()} | {"fetched": (near, selected)}
        forms |= {f"token, {name}": lambda args=args: token(params, context, *args) for name, args in decoding.items()}
        forms |= {f"fetch, {name}": lambda name=name: fetch(banks[name], selection) for name in ("host", "disk")}
        seconds = median_seconds(forms, repeats)
    milliseconds = {name: round(1e3 * value, 3) for name, value in seconds.items()}
    for name, value in milliseconds.items():
        print(f"{name:20}{value:10.2f} ms")
    return dict(
        model="tiny", tokens=tokens, chunks=banks["device"].num_chunks, top_k=TOP_K, chunks_a_document=CHUNKS_EACH,
        content_mib=round(2 * banks["device"].content_k.nbytes / 2**20, 1), milliseconds=milliseconds,
        note="the files of the bank were in the page cache",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compiled", "latency"))
    parser.add_argument("--chips", default=",".join(tiers_compiled.SHARES))
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/tiers.json"))
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if options.what == "compiled":
        versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        found = dict(tiers_compiled.table(options.chips.split(",")), versions=versions)
    else:
        found = latency(options.tokens, options.repeats) | environment()
    command = f"python -m benchmarks.tiers {options.what}"
    write_json(options.out, record | {options.what: dict(found, command=command)})


if __name__ == "__main__":
    main()
