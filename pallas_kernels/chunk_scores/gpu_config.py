"""What the Hopper kernels of `chunk_scores` can run, and how a call is cut into blocks."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

WARPGROUPS = 2  # that multiply; one more copies
# Shared memory of a block on sm_90, less what barriers and the compiler's scratch take.
_SHARED_BYTES = 227 * 1024 - 4096
# By device kind, as real devices and abstract ones name themselves.
_HOPPER = re.compile(r"\b(GH200|H\d00|H20)\b")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes to tune for a device.

    rows: chunks a warpgroup scores at a time, a multiple of 64; twice as many if the query is streamed.
    accumulators: most products a warpgroup holds, chunks times tokens; 16,384 are 128 registers a thread.
    step_bytes: most bytes of keys in a pipeline stage.
    query_bytes: largest query that stays in shared memory throughout; a larger one is streamed with the keys.
    stages: most stages of the pipeline.
    """

    rows: int = 64
    accumulators: int = 16384
    step_bytes: int = 16384
    query_bytes: int = 136 * 1024
    stages: int = 8


# By device kind. "default" is reasoned from bytes in flight, not measured.
BLOCKS = {"default": Blocks()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Blocks of one call. A column block is `tokens` tokens of each of `questions` questions.

    by_token: columns are token-major (an elementwise max over tokens), else question-major (a max along rows).
    groups, blocks: groups of questions, and blocks of tokens of each group, which a running max folds.
    pieces: bfloat16 terms whose sum is the query.
    strip, sub: width of one copy of keys, of query, in elements.
    copies, steps: strips of keys in a pipeline stage, and stages that a tile takes.
    rows: chunks of a warpgroup.
    resident: whether the whole query stays in shared memory.
    """

    by_token: bool
    questions: int
    tokens: int
    groups: int
    blocks: int
    pieces: int
    strip: int
    sub: int
    copies: int
    steps: int
    rows: int
    resident: bool
    stages: int

    @property
    def columns(self) -> int:
        return self.questions * self.tokens


def unsupported(query, keys) -> str | None:
    """Why the kernels cannot run on these arrays (or shapes with dtypes) here, in one sentence, or None."""
    platform, kind = dispatch.device()
    if not dispatch.interpreted() and not _is_hopper(platform, kind):
        return f"it needs a Hopper GPU (compute capability 9.0: tensor copies and wgmma), and this is {kind!r}."
    if keys.dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
        return f"keys must be float32, bfloat16 or int8, got {keys.dtype}."
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8):
        return f"query must be float32, bfloat16, float16 or int8, got {query.dtype}."
    width, itemsize = keys.shape[-1], keys.dtype.itemsize
    if width * itemsize % 16:
        return f"rows of keys must be a multiple of 16 bytes for tensor copies, got M {width} of {keys.dtype}."
    if strip_width(width, query.dtype, keys.dtype) is None:
        widths = " or ".join(map(str, _strips(query.dtype, keys.dtype)))
        return f"M must be a multiple of {widths} for {keys.dtype} keys and {query.dtype} queries, got {width}."
    return None


def _is_hopper(platform: str, kind: str) -> bool:
    for device in jax.devices():
        if device.device_kind == kind and hasattr(device, "compute_capability"):
            return device.compute_capability == "9.0"
    return platform == "gpu" and _HOPPER.search(kind) is not None


def multiprocessors() -> int:
    """Blocks that run at once on the device a program is traced for; 132, as of an H100 or H200, if unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return getattr(device, "core_count", None) or getattr(device, "num_cores", None) or 132


def _strips(query_dtype, key_dtype) -> list[int]:
    itemsize = jnp.dtype(key_dtype).itemsize
    # Rows swizzled by 32 bytes are too narrow for int8 in wgmma, and for the bfloat16 terms of float32.
    narrowest = 64 if query_dtype == jnp.int8 or itemsize == 4 else 32
    return [n // itemsize for n in (128, 64, 32) if n >= narrowest]


def strip_width(width: int, query_dtype, key_dtype) -> int | None:
    """Elements of a row of keys in one copy, the widest that divides M or holds all of it; None if none does.

    The copy engine writes zeros for what lies beyond M.
    """
    fitting = (n for n in _strips(query_dtype, key_dtype) if width % n == 0 or width <= n)
    return next(fitting, None)


def plan(query, keys, winners: bool) -> Plan:
    """The blocks of a supported call; `query` is float32, bfloat16 or int8."""
    sizes = BLOCKS.get(dispatch.device()[1], BLOCKS["default"])
    attempts = [(sizes.rows, True, 1), (2 * sizes.rows, False, 1), *((sizes.rows, False, n) for n in (1, 2, 4))]
    plans = (_plan(query, keys, 1 + winners, sizes, *attempt) for attempt in attempts)
    return next(p for p in plans if p is not None and p.stages > 2)


def _plan(query, keys, outputs, sizes, rows, resident, part):
    b, t, width = query.shape
    query_itemsize = 1 if query.dtype == jnp.int8 else 2
    pieces = 3 if query.dtype == jnp.float32 else 1
    strip = strip_width(width, query.dtype, keys.dtype)
    sub = min(strip, 128 // query_itemsize)
    strips = -(-width // strip)

    questions_8, tokens_8 = -(-b // 8) * 8, -(-t // 8) * 8
    by_token = t * questions_8 < b * tokens_8
    most = min(256, sizes.accumulators // rows // part)
    if by_token:
        most //= 2 * outputs  # the running max holds as many again
        questions = min(questions_8, most)
        tokens = max(1, min(t, most // questions))
    else:
        tokens = min(tokens_8, most)
        questions = max(1, min(b, most // tokens))
    groups, blocks = -(-b // questions), -(-t // tokens)

    columns_bytes = pieces * questions * tokens * strip * query_itemsize
    query_bytes = columns_bytes * strips * groups * blocks
    if resident and query_bytes > sizes.query_bytes:
        return None
    strip_bytes = WARPGROUPS * rows * strip * keys.dtype.itemsize
    fit = max(1, sizes.step_bytes * rows // sizes.rows // strip_bytes)
    copies = max(n for n in range(1, min(strips, fit) + 1) if strips % n == 0)
    stage = copies * (strip_bytes + (0 if resident else columns_bytes))
    kept = 4 * outputs * WARPGROUPS * rows * questions + (query_bytes if resident else 0)
    stages = min(sizes.stages, (_SHARED_BYTES - kept) // stage)
    return Plan(
        by_token,
        questions,
        tokens,
        groups,
        blocks,
        pieces,
        strip,
        sub,
        copies,
        strips // copies,
        rows,
        resident,
        stages,
    )
