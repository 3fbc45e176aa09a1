"""Speed of the operations on one GPU against their floors: bytes over copy bandwidth, arithmetic over matmul rate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import seconds_per_call
from msa_jax import routing
from msa_jax.memory import DocumentLayout
from pallas_kernels import chunk_scores, gather_attention


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured. Model sizes are those of the 4B model, memory that of 100M tokens at 64 a chunk."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    top_k: int = 16
    chunks: int = 1_562_500
    document_chunks: int = 8
    layers: int = 18
    routing: tuple[tuple[int, int], ...] = ((1, 1), (1, 16), (1, 64), (8, 1), (8, 16), (8, 64))  # B, T
    bank: int = 262_144  # chunks of content: 1 GB, far more than the cache
    longest: int = 128
    attention: tuple[tuple[int, int, int], ...] = ((1, 64, 128), (8, 64, 128), (1, 1, 256), (8, 1, 256), (64, 1, 256))
    training_bank: int = 16_384
    training: tuple[tuple[int, int, int], ...] = ((8, 64, 128), (48, 64, 128))  # B, T, S
    copies: int = 1 << 30  # elements of float32 that are copied
    square: int = 8192  # rows and columns of the matrices whose product gives the arithmetic rate
    sets: int = 32  # selections that take turns: together more chunks than the cache holds, B 1 included
    calls: int = 4  # in one program: a decoding step is shorter than the time that starting it takes

    @property
    def width(self) -> int:
        return self.kv_heads * self.head_dim

    def ranges(self, b: int, seed: int = 0, bank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths [b, k] int32 of documents of 1 to `longest` chunks."""
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, self.longest + 1, (b, self.top_k))
        starts = rng.integers(0, (bank or self.bank) - self.longest, (b, self.top_k))
        return starts.astype(np.int32), lengths.astype(np.int32)


SIZES = Sizes()
TINY = Sizes(
    heads=4, kv_heads=2, head_dim=16, top_k=3, chunks=1000, layers=2, routing=((2, 3),), bank=256, longest=9,
    attention=((2, 3, 5),), training_bank=128, training=((2, 3, 5),), copies=1 << 12, square=64, sets=4, calls=2,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rates:
    """Bytes moved (read and written) and bfloat16 operations done in a second, measured in the same run."""

    copy: float
    matmul: float

    def floor(self, bytes_moved: float, operations: float) -> float:
        """Seconds below which nothing runs."""
        return max(bytes_moved / self.copy, operations / self.matmul)


def measure_rates(sizes: Sizes) -> Rates:
    """A device-to-device copy of several GB, and a large bfloat16 matrix product of random numbers."""
    x = jax.random.normal(jax.random.key(0), (sizes.copies,), jnp.float32)
    copied = seconds_per_call(jax.jit(jnp.copy), [(x,)])
    del x
    a, b = (jax.random.normal(jax.random.key(i), (sizes.square,) * 2, jnp.bfloat16) for i in (1, 2))
    multiplied = seconds_per_call(jax.jit(jnp.matmul), [(a, b)])
    return Rates(copy=2 * 4 * sizes.copies / copied, matmul=2 * sizes.square**3 / multiplied)


@functools.partial(jax.jit, static_argnums=(1, 2))
def keys_of(seed, shape, dtype):
    """Random routing keys, queries or content: "int8", or anything else for bfloat16."""
    if dtype == "int8":
        return jax.random.randint(jax.random.key(seed), shape, -127, 128, jnp.int8)
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _figures(seconds: float, floor: float, **more) -> dict:
    return {"ms": 1e3 * seconds, "floor_ms": 1e3 * floor, "of_floor": floor / seconds} | more


def routing_table(sizes: Sizes, rates: Rates, implementations: tuple[str, ...], attempt: Callable) -> None:
    """`chunk_scores` for every form of keys, B and T: time, GB/s of keys and scores, share of the copy bandwidth."""
    for form in ("bfloat16", "int8 keys", "int8 both"):
        dtype = "bfloat16" if form == "bfloat16" else "int8"
        keys = keys_of(0, (sizes.chunks, sizes.width), dtype)
        scale = jnp.full((sizes.chunks,), 0.01, jnp.float32)
        for b, t in sizes.routing:
            query = keys_of(1, (b, t, sizes.width), "int8" if form == "int8 both" else "bfloat16")
            given = dict(key_scale=scale) if dtype == "int8" else {}
            if form == "int8 both":
                given["query_scale"] = jnp.full((b, t), 0.01, jnp.float32)
            moved = keys.nbytes + 4 * b * sizes.chunks + (scale.nbytes if given else 0) + query.nbytes
            # The tensor cores do int8 products twice as fast.
            operations = 2 * b * t * sizes.chunks * sizes.width / (2 if form == "int8 both" else 1)
            for implementation in implementations:
                op = jax.jit(functools.partial(chunk_scores, **given, implementation=implementation))

                def measure(op=op, query=query, moved=moved, operations=operations, keys=keys):
                    seconds = seconds_per_call(op, [(query, keys)])
                    share = {"gb_per_s": moved / seconds / 1e9, "of_copy_bandwidth": moved / seconds / rates.copy}
                    return _figures(seconds, rates.floor(moved, operations), **share)

                attempt(f"routing, {form}, B {b}, T {t}, {implementation}", measure)


def all_layers(sizes: Sizes, rates: Rates, implementations: tuple[str, ...], attempt: Callable) -> None:
    """Scores, document maximum and top k of every router layer in one program: a scan over stacked keys, or apart."""
    owners = np.arange(sizes.chunks) // sizes.document_chunks
    layout = DocumentLayout.from_chunk_documents(owners, int(owners[-1]) + 1)
    shape, layers = (sizes.chunks, sizes.width), jnp.arange(sizes.layers)
    moved = 2 * sizes.layers * sizes.chunks * sizes.width

    def route_one(query, keys, implementation, layer=None):
        where = dict(route=jnp.ones(query.shape[:2], bool), layer=layer, implementation=implementation)
        return routing.select(routing.document_scores(query, keys, layout, **where), layout, sizes.top_k)

    @jax.jit
    def stack(layers):
        return jax.lax.map(lambda seed: keys_of(seed, shape, "bfloat16"), layers)

    def stacked(queries, keys, implementation):
        one = lambda _, x: (None, route_one(x[0], keys, implementation, x[1]))  # noqa: E731
        return jax.lax.scan(one, None, (queries, layers))[1]

    def apart(queries, keys, implementation):
        return [route_one(query, own, implementation) for query, own in zip(queries, keys, strict=True)]

    for form in (stacked, apart):
        if form is stacked:  # in one array, made layer by layer
            keys = stack(layers)
        else:
            keys = [keys_of(seed, shape, "bfloat16") for seed in range(sizes.layers)]
        for t in dict.fromkeys(t for _, t in sizes.routing):
            queries = keys_of(100, (sizes.layers, 1, t, sizes.width), "bfloat16")
            for implementation in implementations:
                route = jax.jit(functools.partial(form, implementation=implementation))

                def measure(route=route, inputs=(queries, keys), t=t):
                    floor = rates.floor(moved, moved * t)  # two bytes and two operations a token for each number
                    return _figures(seconds_per_call(route, [inputs]), floor)

                name = f"routing and selection of {sizes.layers} layers, {form.__name__}, T {t}, {implementation}"
                attempt(name, measure)
        del keys, measure  # the next form needs the room


def _attention_floor(sizes, rates, case, selected, bank, gradients):
    """Every operand and result moved once; of a selected document, its chunks; of gradients, all of the bank."""
    b, t, s = case
    own, rows = b * s * sizes.width, b * t * sizes.heads
    moved = 2 * (2 * rows * sizes.head_dim + 2 * own) + 4 * rows + 2 * selected * sizes.width * 2
    operations = 4 * t * sizes.heads * sizes.head_dim * (selected + b * (s - (t - 1) / 2))
    if gradients:
        # Once more all that, the gradients of q, k, v, and that of the bank, which is dense.
        moved += moved + 2 * (2 * rows * sizes.head_dim + 2 * own) + 2 * bank * sizes.width * 2
        operations *= 3.5
    return rates.floor(moved, operations)


def attention_table(sizes: Sizes, rates: Rates, implementations: tuple[str, ...], attempt: Callable) -> None:
    """`gather_attention`, forward over a large bank, and forward and backward over a batch's documents."""
    for gradients, bank, cases in ((False, sizes.bank, sizes.attention), (True, sizes.training_bank, sizes.training)):
        bank_k, bank_v = (keys_of(i, (bank, sizes.kv_heads, sizes.head_dim), "bfloat16") for i in (0, 1))
        for b, t, s in cases:
            q = keys_of(2, (b, t, sizes.heads, sizes.head_dim), "bfloat16")
            k, v = (keys_of(i, (b, s, sizes.kv_heads, sizes.head_dim), "bfloat16") for i in (3, 4))
            chosen = [sizes.ranges(b, seed, bank) for seed in range(sizes.sets)]
            selected = float(np.mean([length.sum() for _, length in chosen]))
            floor = _attention_floor(sizes, rates, (b, t, s), selected, bank, gradients)
            for implementation in implementations:

                def attend(q, k, v, bank_k, bank_v, starts, lengths, implementation=implementation):
                    bank = dict(bank_k=bank_k, bank_v=bank_v, starts=starts, lengths=lengths)
                    bank["max_length"] = sizes.longest
                    return gather_attention(q, k, v, **bank, implementation=implementation)[0]

                def both(*arguments, attend=attend):
                    out, pull_back = jax.vjp(lambda *floats: attend(*floats, *arguments[5:]), *arguments[:5])
                    return out, pull_back(out)

                one = both if gradients else attend
                program = jax.jit(lambda a, many, one=one: [one(*a, *ranges) for ranges in many])
                ranges = [tuple(jnp.asarray(x) for x in pair) for pair in chosen]
                groups = [ranges[i : i + sizes.calls] for i in range(0, sizes.sets, sizes.calls)]
                inputs = [((q, k, v, bank_k, bank_v), group) for group in groups]

                def measure(program=program, inputs=inputs, floor=floor):
                    return _figures(seconds_per_call(program, inputs) / sizes.calls, floor)

                what = "forward and backward" if gradients else "forward"
                attempt(f"attention {what}, B {b}, T {t}, S {s}, {implementation}", measure)
