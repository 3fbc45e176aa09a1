"""What routing costs against the size of the memory: time and bytes over C, with the exponents of both.

    python -m benchmarks.routing_cost [--chunks=16384,...] [--json=FILE] [--plot=FILE]

The largest default, 1,562,500 chunks (100M tokens at 64 a chunk), needs 6.4 GB for its keys.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks.measure import environment, exponent, median_seconds, write_json
from msa_jax import routing
from msa_jax.memory import DocumentLayout

_CHUNKS = flags.DEFINE_list("chunks", ["16384", "65536", "262144", "1562500"], "C, sizes of the bank.")
_TOKENS = flags.DEFINE_list("tokens", ["1", "64"], "T, routing tokens of the one question that is timed.")
_BATCH = flags.DEFINE_list("batch", ["1", "8"], "B, questions, for memory; times are of B = 1.")
_WIDTH = flags.DEFINE_integer("width", 1024, "M, width of a routing key, float32.")
_DOCUMENT_CHUNKS = flags.DEFINE_integer("document_chunks", 8, "Chunks of a document.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each size.")
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
_PLOT = flags.DEFINE_string("plot", None, "PNG file to draw them in.")


@jax.jit
def _route(query, keys, layout):
    scores = routing.document_scores(query, keys, layout, route=jnp.ones(query.shape[:2], bool))
    return routing.select(scores, layout, 16)


def _layout(chunks: int) -> DocumentLayout:
    owners = np.arange(chunks) // _DOCUMENT_CHUNKS.value
    return DocumentLayout.from_chunk_documents(owners, int(owners[-1]) + 1)


def bytes_of(batch: int, tokens: int, chunks: int, width: int) -> dict[str, int]:
    """What the compiled program holds: arguments (keys, query, layout), results, and all else at its peak."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    compiled = _route.lower(shape((batch, tokens, width)), shape((chunks, width)), _layout(chunks)).compile()
    sizes = compiled.memory_analysis()
    return {
        "keys": 4 * chunks * width,
        "peak": sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes,
        "arguments": sizes.argument_size_in_bytes,
        "results": sizes.output_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
    }


def time_of(tokens: list[int], chunks: int, width: int, repeats: int) -> dict[str, float]:
    """Median seconds of routing one question, by its number of tokens."""
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.random((chunks, width), np.float32))
    layout = _layout(chunks)
    queries = {str(t): jnp.asarray(rng.standard_normal((1, t, width), np.float32)) for t in tokens}
    forms = {t: functools.partial(_route, query, keys, layout) for t, query in queries.items()}
    return median_seconds(forms, repeats)


def plot(record: dict, path: str) -> None:
    """Both curves, log-log, with the exponents in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    chunks = record["chunks"]
    for tokens, seconds in record["seconds"].items():
        power = record["time_exponents"][tokens]
        left.loglog(chunks, seconds, "o-", label=f"T {tokens}: time ~ C^{power:.2f}")
    left.set(xlabel="C, chunks of the memory", ylabel="seconds a question", title="time, two CPU cores")
    right.loglog(chunks, [4 * c * record["width"] for c in chunks], "k--", label="routing keys")
    for case, sizes in record["bytes"].items():
        beyond = [size["results"] + size["temporaries"] for size in sizes]
        power = record["memory_exponents"][case]
        right.loglog(chunks, beyond, "o-", label=f"beyond them, {case} (sum ~ C^{power:.2f})")
    right.set(xlabel="C, chunks of the memory", ylabel="bytes", title="memory")
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    logging.set_verbosity(logging.WARNING)
    chunks, tokens, batches = ([int(x) for x in flag.value] for flag in (_CHUNKS, _TOKENS, _BATCH))
    width = _WIDTH.value
    record = environment() | {"width": width, "chunks": chunks, "bytes": {}, "seconds": {str(t): [] for t in tokens}}
    print(f"{'C':>9s} {'B':>3s} {'T':>3s} {'keys MB':>9s} {'temporaries + results MB':>25s} {'bytes / (B C)':>14s}")
    for batch in batches:
        for t in tokens:
            sizes = record["bytes"].setdefault(f"B {batch}, T {t}", [])
            for c in chunks:
                size = bytes_of(batch, t, c, width)
                sizes.append(size)
                beyond = size["results"] + size["temporaries"]
                each = beyond / (batch * c)
                print(f"{c:9d} {batch:3d} {t:3d} {size['keys'] / 1e6:9.1f} {beyond / 1e6:25.2f} {each:14.2f}")
    for c in chunks:
        for t, seconds in time_of(tokens, c, width, _REPEATS.value).items():
            record["seconds"][t].append(seconds)
            print(f"C {c}, T {t}: {1e3 * seconds:.2f} ms")
    record["time_exponents"] = {t: exponent(chunks, seconds) for t, seconds in record["seconds"].items()}
    record["memory_exponents"] = {
        case: exponent(chunks, [size["peak"] for size in sizes])
        for case, sizes in record["bytes"].items()
    }
    for t, power in record["time_exponents"].items():
        print(f"time ~ C^{power:.3f} (B 1, T {t})")
    for case, power in record["memory_exponents"].items():
        print(f"peak memory ~ C^{power:.3f} ({case})")
    if _JSON.value:
        write_json(_JSON.value, record)
    if _PLOT.value:
        plot(record, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
