"""A bank of the 4B model's sizes filled with random vectors: writing, opening, changing; and 100M tokens by arithmetic.

    python -m benchmarks.bank_4b --folder /tmp/4b.bank --gigabytes 40

Documents have 1,024 tokens, 16 chunks. Every commit writes the same random block, which storage cannot tell, as
nothing is compressed. Peak memory is the writing process's, with everything imported.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import statistics
import time

import ml_dtypes
import numpy as np
from tqdm import tqdm

from benchmarks.bank_scale import drop_caches
from benchmarks.measure import environment, write_json
from msa_jax import MemoryStore, MSAConfig
from msa_jax.bank import BankDocument, BankSpec
from msa_jax.bank.change import Encoded
from msa_jax.bank.ingest import commit_tokens_of
from msa_jax.bank.stats import chunk_bytes, disk_bytes, on_device

_CHUNKS_A_DOCUMENT = 16
_TOKENS = 100_000_000
_DEVICES = ("h200", "a800", "v5p", "v5e")


def spec_4b() -> BankSpec:
    c = MSAConfig.preset("qwen3_4b")
    return BankSpec(
        fingerprint="random vectors", text="no text", chunk_size=c.chunk_size, layers=len(c.router_layers),
        width=c.router_width, kv_heads=c.num_kv_heads, head_dim=c.head_dim, dtype="bfloat16",
    )  # fmt: skip


def random_chunks(spec: BankSpec, documents: int) -> Encoded:
    """Chunks of documents, standard normal."""
    rng, chunks = np.random.default_rng(0), documents * _CHUNKS_A_DOCUMENT
    draw = lambda *rest: rng.standard_normal((spec.layers, chunks, *rest), np.float32).astype(ml_dtypes.bfloat16)  # noqa: E731
    lengths = np.full(documents, _CHUNKS_A_DOCUMENT, np.int64)
    content = (spec.kv_heads, spec.head_dim)
    ordinals = np.arange(1, documents + 1)
    return Encoded(
        draw(spec.width), draw(*content), draw(*content), lengths, lengths * spec.chunk_size, ordinals, ordinals
    )


def put(store: MemoryStore, encoded: Encoded, first: int) -> None:
    """Commit as many documents as `encoded` has."""
    numbers = range(first, first + len(encoded.lengths))
    ordinals = store.manifest.next_text + np.arange(len(numbers))
    encoded = encoded._replace(ordinals=ordinals, numbers=ordinals)
    store.append([BankDocument(f"document {i}", f"text of {i}") for i in numbers], encoded, range(len(encoded.lengths)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--gigabytes", type=float, default=40.0)
    parser.add_argument("--out", default="benchmarks/results/bank_4b.json")
    options = parser.parse_args()
    spec = spec_4b()
    a_commit = max(1, commit_tokens_of(spec) // spec.chunk_size // _CHUNKS_A_DOCUMENT)
    block, one = random_chunks(spec, a_commit), random_chunks(spec, 1)
    commits = max(1, int(options.gigabytes * 1e9 / (spec.bytes_per_chunk * a_commit * _CHUNKS_A_DOCUMENT)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with MemoryStore.create(options.folder, spec) as store:
        begin = time.perf_counter()
        for i in tqdm(range(commits), desc="fill", unit="commit"):
            put(store, block, i * a_commit)
        filling = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        m = store.manifest
        filled = dict(documents=m.documents, tokens=m.tokens, chunks=m.chunks, disk_bytes=disk_bytes(store))
    cold = drop_caches()
    begin = time.perf_counter()
    MemoryStore(options.folder).close()
    opening = time.perf_counter() - begin
    adds = []
    with MemoryStore(options.folder, writable=True) as store:
        grown = disk_bytes(store)
        for _ in range(9):
            begin = time.perf_counter()
            put(store, one, store.manifest.rows)
            adds.append(time.perf_counter() - begin)
        grown = (disk_bytes(store) - grown) // len(adds)
        begin = time.perf_counter()
        store.delete(["document 0"])
        deleting = time.perf_counter() - begin
        drop_caches()
        begin, total = time.perf_counter(), 0
        for layer in range(spec.layers):
            total += store.array("content_k")[layer, :4096].read().result().nbytes
        reading = total / (time.perf_counter() - begin)
    drop_caches()
    begin, total = time.perf_counter(), 0
    for file in list(pathlib.Path(options.folder).glob("bank-*/d/*"))[:8]:
        total += len(file.read_bytes())
    raw = total / (time.perf_counter() - begin)
    chunks = -(-_TOKENS // spec.chunk_size)
    record = {
        "command": f"python -m benchmarks.bank_4b --gigabytes {options.gigabytes:g}",
        "filled": filled,
        "write_bytes_per_second": round(m.chunks * spec.bytes_per_chunk / filling),
        "peak_bytes_above_start": peak - before,
        "open_cold_seconds" if cold else "open_seconds": round(opening, 4),
        "add_one_seconds": round(statistics.median(adds), 4),
        "add_one_worst_seconds": round(max(adds), 4),
        "add_one_disk_bytes": grown,
        "delete_one_seconds": round(deleting, 4),
        "array_read_bytes_per_second": round(reading),
        "file_read_bytes_per_second": round(raw),
        "at_100m_tokens": {
            "chunks": chunks,
            "bytes": {tier: {f: chunks * b for f, b in forms.items()} for tier, forms in chunk_bytes(spec).items()},
            "devices": {name: on_device(spec, chunks, name)["needs"] for name in _DEVICES},
        },
    } | environment()
    write_json(options.out, record)
    print({name: value for name, value in record.items() if name != "at_100m_tokens"})


if __name__ == "__main__":
    main()
