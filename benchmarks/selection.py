"""Forms of selecting documents from chunk scores, each alternative timed beside the one the library uses.

    python -m benchmarks.selection [--json=FILE]

Three questions: the top k of N documents, the max over a document's chunks, and whether scoring a tile of chunks
and keeping only the tile's best documents beats writing all scores first.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks.measure import environment, median_seconds, write_json
from msa_jax import routing
from msa_jax.memory import DocumentLayout
from msa_jax.routing import exact

_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
_REPEATS = flags.DEFINE_integer("repeats", 9, "Timed calls of each form, taken in turn.")
_TOP_K = flags.DEFINE_integer("top_k", 16, "k, documents selected.")
_DOCUMENTS = flags.DEFINE_list("documents", ["16384", "131072", "1048576"], "N, of the top k.")
_CHUNKS = flags.DEFINE_list("chunks", ["16384", "262144", "1562500"], "C, of the max over chunks.")
_BATCH = flags.DEFINE_list("batch", ["1", "8", "64"], "B, questions.")
_FUSED_CHUNKS = flags.DEFINE_integer("fused_chunks", 131_072, "C of the fused selection.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "T of the fused selection.")
_WIDTH = flags.DEFINE_integer("width", 1024, "M of the fused selection, float32.")

# Chunks of a document in the fused selection: whole documents to a tile, which is its best case.
_DOCUMENT = 8


def top_k_forms(scores: jax.Array, k: int) -> dict:
    """Indices of the k largest of [B, N]."""
    forms = {
        "jax.lax.top_k": lambda s: jax.lax.top_k(s, k)[1],
        "library, exact": lambda s: routing.top_k_indices(s, k),
        "library, approximate": lambda s: routing.top_k_indices(s, k, method="approximate"),
    }
    return {name: functools.partial(jax.jit(form), scores) for name, form in forms.items()}


def document_max_forms(scores: jax.Array, layout: DocumentLayout) -> dict:
    """Max over each document's chunks, [B, C] -> [B, N]."""

    def segments(s, **hint):
        owners, count = layout.chunk_documents, layout.num_documents + 1
        return jax.ops.segment_max(s.T, owners, num_segments=count, **hint)[:-1].T

    def gathered(s):
        offset = jnp.arange(layout.max_length)[None]
        mine = offset < layout.lengths[:, None]
        read = jnp.take(s, jnp.where(mine, layout.starts[:, None] + offset, 0), axis=1)
        return jnp.max(jnp.where(mine[None], read, routing.NO_SCORE), axis=2)

    def doubling(s):
        owner, reach = layout.chunk_documents, 1
        before = lambda x, fill: jnp.pad(x[..., :-reach], [(0, 0)] * (x.ndim - 1) + [(reach, 0)], constant_values=fill)  # noqa: E731
        while reach < layout.max_length:
            same = (owner == before(owner, -1))[None]
            s = jax.lax.optimization_barrier(jnp.where(same, jnp.maximum(s, before(s, routing.NO_SCORE)), s))
            reach *= 2
        return jnp.take(s, layout.starts + layout.lengths - 1, axis=1)

    forms = {
        "segment_max": segments,
        "segment_max, said to be sorted": functools.partial(segments, indices_are_sorted=True),
        "gather of [N, max_length]": gathered,
        "segmented scan by doubling": doubling,
        "library": lambda s: exact._document_max(s, layout),
    }
    return {name: functools.partial(jax.jit(form), scores) for name, form in forms.items()}


def fused_forms(query: jax.Array, keys: jax.Array, layout: DocumentLayout, k: int) -> dict:
    """Documents [B, k]: the library's three steps, and one pass that keeps the best k of every tile of chunks."""
    b, t, m = query.shape
    chunks = keys.shape[0]

    def library(query, keys):
        scores = routing.document_scores(query, keys, layout, route=jnp.ones((b, t), bool))
        return routing.select(scores, layout, top_k=k).documents

    def fused(tile, query, keys):
        flat = query.reshape(b * t, m)

        def one(_, part):
            first, part = part
            scores = jnp.max((flat @ part.T).reshape(b, t, tile // _DOCUMENT, _DOCUMENT), axis=(1, 3))
            best, place = jax.lax.top_k(scores, k)
            return None, (best, place + first // _DOCUMENT)

        tiles = keys.reshape(chunks // tile, tile, m)
        _, (best, documents) = jax.lax.scan(one, None, (jnp.arange(chunks // tile) * tile, tiles))
        best, documents = (jnp.moveaxis(x, 0, 1).reshape(b, -1) for x in (best, documents))
        return jnp.take_along_axis(documents, jax.lax.top_k(best, k)[1], axis=1)

    forms = {"library": library} | {
        f"fused, tiles of {tile}": functools.partial(fused, tile) for tile in (2048, 8192, 32768) if tile < chunks
    }
    return {name: functools.partial(jax.jit(form), query, keys) for name, form in forms.items()}


def layouts(chunks: int) -> dict[str, DocumentLayout]:
    """Documents of 8 chunks each, and of 1 to 64 with unused chunks at the end."""
    mixed = np.random.default_rng(0).integers(1, 65, chunks // 16)
    mixed = mixed[np.cumsum(mixed) <= chunks]
    made = {}
    for name, lengths in (("8 chunks each", np.full(chunks // 8, 8)), ("1 to 64 chunks", mixed)):
        owners = np.full(chunks, len(lengths))
        owners[: lengths.sum()] = np.repeat(np.arange(len(lengths)), lengths)
        made[name] = DocumentLayout.from_chunk_documents(owners, len(lengths))
    return made


def compare(title: str, forms: dict, record: dict) -> None:
    """Time the forms, which must agree to the last bit, and note and print their medians."""
    results = [np.asarray(form()) for form in forms.values()]
    if not all((result == results[0]).all() for result in results):
        raise SystemExit(f"{title}: the forms disagree.")
    record[title] = median_seconds(forms, _REPEATS.value)
    print(f"{title:44s}", ", ".join(f"{name} {1e3 * s:.3f}" for name, s in record[title].items()), flush=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    logging.set_verbosity(logging.WARNING)
    documents, chunks, batches = ([int(x) for x in flag.value] for flag in (_DOCUMENTS, _CHUNKS, _BATCH))
    rng, k = np.random.default_rng(0), _TOP_K.value
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    record = environment() | {"unit": "median seconds", "top_k": {}, "document_max": {}, "fused": {}}
    print(record["device"], "medians in ms")
    for n in documents:
        for b in batches:
            compare(f"top {k} of N {n}, B {b}", top_k_forms(normal(b, n), k), record["top_k"])
    for c in chunks:
        for name, layout in layouts(c).items():
            for b in batches:
                forms = document_max_forms(normal(b, c), layout)
                compare(f"max over C {c}, {name}, B {b}", forms, record["document_max"])
    c, t, m = _FUSED_CHUNKS.value, _TOKENS.value, _WIDTH.value
    layout, keys = layouts(c)["8 chunks each"], normal(c, m)
    for b in batches[:2]:
        compare(f"route C {c}, T {t}, M {m}, B {b}", fused_forms(normal(b, t, m), keys, layout, k), record["fused"])
    if _JSON.value:
        write_json(_JSON.value, record)


if __name__ == "__main__":
    app.run(main)
