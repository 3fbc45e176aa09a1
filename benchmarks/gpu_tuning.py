"""Block sizes of the GPU kernels: candidates timed at the sizes of the 4B model, the fastest of each case noted.

One size is varied at a time, from the best so far: all combinations would take longer than a machine is lent for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks.gpu_targets import Sizes, keys_of
from benchmarks.measure import seconds_per_call
from pallas_kernels import chunk_scores, gather_attention
from pallas_kernels.chunk_scores import gpu_config as scores_config
from pallas_kernels.gather_attention import gpu_config as attention_config

SCORES = {
    "stages": (4, 6, 12), "step_bytes": (8192, 32768), "rows": (128,), "accumulators": (8192,), "query_bytes": (65536,),
}  # fmt: skip
ATTENTION = {"splits": (1, 2, 4, 8, 16), "consumers": (1, 2), "stages": (2, 3, 4), "lag": (1, 2)}


@contextlib.contextmanager
def scores_with(**changes) -> Iterator[None]:
    """A scope in which `chunk_scores` is cut as its default says, with changes."""
    blocks, kept = scores_config.BLOCKS, dict(scores_config.BLOCKS)
    for name in kept:
        blocks[name] = dataclasses.replace(kept[name], **changes)
    jax.clear_caches()
    try:
        yield
    finally:
        blocks.update(kept)
        jax.clear_caches()


@contextlib.contextmanager
def attention_with(**changes) -> Iterator[None]:
    """A scope in which `gather_attention` is cut as its rule says, with changes; ValueError if they do not fit."""
    rule = attention_config.choose

    def choose(**case):
        sizes = dataclasses.replace(rule(**case), **changes)
        stage = attention_config.tile_bytes(case["head_dim"], case["dtype"], case["bank_dtype"])
        rows = case.get("row_operands", 1) * sizes.rows * attention_config.row_bytes(case["head_dim"], case["dtype"])
        if sizes.lag >= sizes.stages or rows + sizes.stages * stage > attention_config.SHARED_MEMORY - 8192:
            raise ValueError("does not fit")
        return sizes

    attention_config.choose = choose
    jax.clear_caches()
    try:
        yield
    finally:
        attention_config.choose = rule
        jax.clear_caches()


def _sweep(name: str, axes: dict, scope: Callable, make: Callable[[], tuple[Callable, list]], record) -> None:
    def milliseconds(changes: dict) -> float:
        def measure():
            with scope(**changes):
                program, inputs = make()
                return {"ms": 1e3 * seconds_per_call(program, inputs, rounds=5, enough_seconds=0.02)}

        title = ", ".join(f"{axis} {value}" for axis, value in changes.items()) or "as the rule says"
        return record.attempt(f"tuning, {name}: {title}", measure).get("ms", math.inf)

    default = least = milliseconds({})
    best: dict[str, int] = {}
    for axis, values in axes.items():
        start = dict(best)
        for value in values:
            took = milliseconds(start | {axis: value})
            if took < least:
                least, best = took, start | {axis: value}
    if least < math.inf:
        record.note(f"tuned, {name}", {"changes": best, "ms": least, "ms_by_rule": default})
        print(f"tuned, {name}: {best or 'as the rule says'} {least:.4g} ms (rule {default:.4g})", flush=True)


def tune(sizes: Sizes, implementation: str, record) -> None:
    """Sweep both kernels; `record` is a `gpu.Record`, which keeps every candidate's time."""
    shapes = dict.fromkeys([*sizes.routing[:3], sizes.routing[-1]])
    for dtype, (b, t) in itertools.product(("bfloat16", "int8"), shapes):
        keys, query = keys_of(0, (sizes.chunks, sizes.width), dtype), keys_of(1, (b, t, sizes.width), "bfloat16")
        given = dict(key_scale=jnp.ones((sizes.chunks,), jnp.float32)) if dtype == "int8" else {}

        def scores(keys=keys, query=query, given=given):
            op = functools.partial(chunk_scores, **given, implementation=implementation)
            return jax.jit(op), [(query, keys)]

        _sweep(f"chunk_scores, {dtype} keys, B {b}, T {t}", SCORES, scores_with, scores, record)
    bank_k, bank_v = (keys_of(i, (sizes.bank, sizes.kv_heads, sizes.head_dim), "bfloat16") for i in (0, 1))
    for b, t, s in sizes.attention:
        q = keys_of(2, (b, t, sizes.heads, sizes.head_dim), "bfloat16")
        k, v = (keys_of(i, (b, s, sizes.kv_heads, sizes.head_dim), "bfloat16") for i in (3, 4))

        def attention(q=q, k=k, v=v):
            def op(q, starts, lengths):
                ranges = dict(starts=starts, lengths=lengths, max_length=sizes.longest)
                return gather_attention(
                    q, k, v, bank_k=bank_k, bank_v=bank_v, **ranges, implementation=implementation
                )[0]  # fmt: skip

            chosen = [sizes.ranges(q.shape[0], seed) for seed in range(sizes.sets)]
            return jax.jit(op), [(q, *(jnp.asarray(x) for x in pair)) for pair in chosen]

        _sweep(f"gather_attention, B {b}, T {t}, S {s}", ATTENTION, attention_with, attention, record)
