"""Routing on the device at hand, beside a bare matrix product, the per-head form, and FAISS if installed.

    python -m benchmarks.routing [--chunks=16384] [--tokens=64] [--json=FILE]
"""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks.measure import environment, median_seconds, write_json
from msa_jax import routing
from msa_jax.memory import DocumentLayout, LayerMemory
from pallas_kernels import chunk_scores

_CHUNKS = flags.DEFINE_integer("chunks", 16_384, "C, chunks of the bank.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "T, routing tokens of the one question.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "K, key/value heads.")
_HEADS = flags.DEFINE_integer("heads", 32, "H, query heads.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "D, head dimension.")
_DOCUMENT_CHUNKS = flags.DEFINE_integer("document_chunks", 8, "Chunks of a document.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls of each form, taken in turn.")
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def _forms(query, per_head, keys, layout):
    """Name -> function without arguments."""
    m = keys.shape[1]
    route = jnp.ones(query.shape[:2], bool)

    @jax.jit
    def route_and_select(query, keys):
        scores = routing.document_scores(query, keys, layout, route=route)
        return routing.select(scores, layout, 16)

    @jax.jit
    def naive(per_head, keys):
        h, d = per_head.shape[2:]
        kv = m // d
        grouped = per_head.reshape(*per_head.shape[:2], kv, h // kv, d)
        scores = jnp.einsum("btkgd,ckd->btkgc", grouped, keys.reshape(-1, kv, d))
        return jnp.max(jnp.mean(scores, axis=(2, 3)), axis=1)

    matmul = jax.jit(lambda q, k: q.reshape(-1, m) @ k.T)
    scores_only = jax.jit(chunk_scores)
    forms = {
        "bare matrix product": lambda: matmul(query, keys),
        "chunk_scores": lambda: scores_only(query, keys),
        "chunk_scores + document max + top-k": lambda: route_and_select(query, keys),
        "per-head scores": lambda: naive(per_head, keys),
    }
    memory = LayerMemory(keys, None, None, layout)
    for name in routing.RETRIEVERS:
        retriever = routing.retriever_of(name, layout)
        choose = jax.jit(lambda query, memory, retriever=retriever: retriever.route(query, memory, None, 16))
        forms[f"retriever {name}"] = lambda choose=choose: choose(routing.Query(query, route), memory)
    if importlib.util.find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatIP(m)
        index.add(np.asarray(keys, np.float32))
        vectors = np.asarray(query[0], np.float32)
        forms["FAISS flat inner product, k 16"] = lambda: index.search(vectors, 16)
    return forms


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    logging.set_verbosity(logging.WARNING)
    h, kv, d = _HEADS.value, _KV_HEADS.value, _HEAD_DIM.value
    rng = np.random.default_rng(0)
    per_head = routing.l2_normalise(jnp.asarray(rng.standard_normal((1, _TOKENS.value, h, d)), jnp.float32))
    query = routing.routing_query(per_head, num_kv_heads=kv, score="cosine")
    keys = routing.routing_key(
        jnp.asarray(rng.standard_normal((_CHUNKS.value, kv, d)), jnp.float32), score="cosine"
    )
    owners = np.arange(_CHUNKS.value) // _DOCUMENT_CHUNKS.value
    layout = DocumentLayout.from_chunk_documents(owners, int(owners[-1]) + 1)
    forms = _forms(query, per_head, keys, layout)
    medians = median_seconds(forms, _REPEATS.value)
    ours = medians["chunk_scores + document max + top-k"]
    where = environment()
    print(f"{where['device']}, jax {jax.__version__}, T {_TOKENS.value}, C {_CHUNKS.value}, M {kv * d}, H {h}")
    print(f"{'':38s} {'median ms':>10s} {'of routing':>11s}")
    for name, seconds in medians.items():
        print(f"{name:38s} {1e3 * seconds:10.2f} {seconds / ours:10.2f}x")
    if _JSON.value:
        sizes = {"T": _TOKENS.value, "C": _CHUNKS.value, "M": kv * d, "H": h}
        write_json(_JSON.value, where | {"sizes": sizes, "median_seconds": medians})


if __name__ == "__main__":
    app.run(main)
