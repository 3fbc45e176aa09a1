"""Sizes of the GPU kernels, from one description of a Hopper multiprocessor: its shared memory and registers."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

WARPGROUP_ROWS = 64  # rows of one wgmma: what a consumer warpgroup owns
MULTIPROCESSORS = 132  # of an H100 or H200
SHARED_MEMORY = 227 * 1024  # bytes a block may have
REGISTERS = 512  # per thread, to be shared by the warpgroups of a block: 65,536 / 128
COLUMNS = 64  # chunks or tokens of a tile: one wgmma deep in P V, and no more waste at a short document's end
ALIGNMENT = 8  # rows of the smallest tile that wgmma reads: TMA copies begin at a multiple of it
MOST_PLANNED = 1024  # numbers of a question's plan, in shared memory
MOST_STAGES = 4  # tiles in flight: 2 cover the latency of memory, 1 is being cleaned, 1 is being used


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of one kernel launch."""

    consumers: int  # warpgroups that compute, each with its own 64 rows
    stages: int  # tiles of the pipeline
    lag: int  # tiles that are loading while the producer makes an earlier one ready
    splits: int  # blocks that share the columns of one set of rows; merged afterwards

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.consumers * WARPGROUP_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of a consumer and of the producer gets; multiples of 8."""
        producer = 104
        return min(240, (REGISTERS - producer) // self.consumers // 8 * 8), producer


@dataclasses.dataclass(frozen=True)
class OwnerSizes:
    """Static sizes of a launch whose blocks own keys and values."""

    consumers: int  # warpgroups that compute, each with its own 64 chunks or tokens
    stages: int  # tiles of query rows in flight

    @property
    def rows(self) -> int:
        """Chunks or tokens of a block."""
        return self.consumers * WARPGROUP_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of a consumer and of the producer gets; this producer only starts copies."""
        return min(240, (REGISTERS - 24) // self.consumers // 8 * 8), 24


def pieces(dtype) -> int:
    """How many bfloat16 numbers stand for one of `dtype` in a product: float32 needs three to lose nothing."""
    return 3 if jnp.dtype(dtype) == jnp.float32 else 1


def bank_is_converted(dtype, bank_dtype) -> bool:
    """Whether content is loaded as it lies and made into tiles of the pieces of `dtype` by the producer."""
    return jnp.dtype(bank_dtype) != jnp.bfloat16 or pieces(dtype) > 1


def row_bytes(head_dim: int, dtype) -> int:
    """Shared memory that each query row keeps for one operand (q, or grad_out)."""
    return head_dim * 2 * pieces(dtype)


def tile_bytes(head_dim: int, dtype, bank_dtype) -> int:
    """Shared memory of a stage: key and value tile, the raw tiles if converted, and its vectors."""
    raw = jnp.dtype(bank_dtype).itemsize if bank_is_converted(dtype, bank_dtype) else 0
    return 2 * COLUMNS * head_dim * (2 * pieces(dtype) + raw) + 4 * (3 * COLUMNS + 2 * WARPGROUP_ROWS)


def choose(*, rows: int, others: int, tiles: int, head_dim: int, dtype, bank_dtype, row_operands: int = 1) -> Sizes:
    """Sizes for `others` (questions times key/value heads) sets of `rows` rows over at most `tiles` tiles.

    Args:
      rows: T * G.
      others: B * K.
      tiles: upper bound of the tiles that a row meets: a split without a tile would be idle.
      head_dim: D.
      dtype, bank_dtype: of q and of the bank.
      row_operands: operands kept per row: 1 forward, 2 (q and grad_out) backward.

    Raises:
      ValueError: one stage does not fit into shared memory.
    """
    stage = tile_bytes(head_dim, dtype, bank_dtype)
    per_consumer = row_operands * WARPGROUP_ROWS * row_bytes(head_dim, dtype)
    consumers, stages = _fit(2 if rows > WARPGROUP_ROWS else 1, per_consumer, stage)
    blocks = -(-rows // (consumers * WARPGROUP_ROWS)) * others
    return Sizes(consumers=consumers, stages=stages, lag=min(2, stages - 1), splits=splits(blocks, tiles))


def splits(blocks: int, tiles: int) -> int:
    """The fewest parts of the columns that keep nine in ten multiprocessors busy, or else the best number of them."""

    def busy(splits):
        waves = -(-blocks * splits // MULTIPROCESSORS)
        return blocks * splits / (waves * MULTIPROCESSORS)

    possible = range(1, max(1, min(tiles, MULTIPROCESSORS)) + 1)
    return next((splits for splits in possible if busy(splits) >= 0.9), max(possible, key=busy))


def choose_owners(*, rows: int, head_dim: int, dtype, owned_dtype) -> OwnerSizes:
    """Sizes of the kernel that owns `rows` chunks or tokens of `owned_dtype`, queries being of `dtype`.

    Raises:
      ValueError: one stage does not fit into shared memory.
    """
    raw = jnp.dtype(owned_dtype).itemsize if bank_is_converted(dtype, owned_dtype) else 0
    per_consumer = 2 * WARPGROUP_ROWS * (row_bytes(head_dim, dtype) + head_dim * raw)
    stage = 2 * COLUMNS * row_bytes(head_dim, dtype) + 3 * 4 * COLUMNS
    consumers, stages = _fit(2 if rows > WARPGROUP_ROWS else 1, per_consumer, stage)
    return OwnerSizes(consumers=consumers, stages=stages)


def fits(head_dim: int, dtype, bank_dtype) -> bool:
    """Whether every kernel of both directions has room for a stage."""
    try:
        choose(rows=1, others=1, tiles=1, head_dim=head_dim, dtype=dtype, bank_dtype=bank_dtype, row_operands=2)
        for owned in (dtype, bank_dtype):
            choose_owners(rows=1, head_dim=head_dim, dtype=dtype, owned_dtype=owned)
    except ValueError:
        return False
    return True


def _fit(consumers: int, per_consumer: int, stage: int) -> tuple[int, int]:
    """Consumers and stages that fit into shared memory: two consumers only where that leaves two stages."""
    free = SHARED_MEMORY - 8 * 1024  # barriers, the plan, scratch of the reductions
    if consumers == 2 and 2 * per_consumer + 2 * stage > free:
        consumers = 1
    stages = min(MOST_STAGES, (free - consumers * per_consumer) // stage)
    if stages < 1:
        raise ValueError(f"a stage of {stage} bytes and {per_consumer} bytes of rows do not fit into shared memory.")
    return consumers, stages
