"""Block sizes of the TPU kernels of `gather_attention`, from one description of their use of VMEM."""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.tpu_chip import LANES, lanes, sublanes

# Rows (token and head of a group) of queries held at once; what pays for reading a chunk.
_MAX_ROWS = 512
# Chunks and own tokens read at once: enough bytes to hide the start of a copy, few enough that the weights of many
# rows fit. With few rows (decoding) there is little work behind which to hide, so larger pieces are read.
_MAX_CHUNKS, _MAX_OWN = 128, 128
_FEW_ROWS = 64
_MAX_CHUNKS_DECODING, _MAX_OWN_DECODING = 256, 512
# Tokens packed in one sublane-tile of bfloat16.
_ROW_TILE = 16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How queries, chunks and own tokens are cut.

    Attributes:
      tokens: active tokens in one block of queries.
      group: query heads of a key/value head, G; a block has tokens * group rows.
      chunks: chunks of the bank read at once.
      own: own tokens read at once.
      tile: chunks, or own tokens, whose gradients one step of the backward pass owns.
    """

    tokens: int
    group: int
    chunks: int
    own: int
    tile: int

    @property
    def rows(self) -> int:
        return self.tokens * self.group

    def vmem_bytes(self, kv_heads: int, head_dim: int, bytes_q: int, bytes_bank: int) -> int:
        """VMEM of the hungriest of the three kernels.

        Args:
          kv_heads, head_dim: K, D.
          bytes_q, bytes_bank: bytes of one element of the queries and own tokens, of the bank.
        """
        d = lanes(head_dim)
        head_rows = sublanes(kv_heads)
        query = kv_heads * self.rows * d
        columns = self.rows * LANES * 4  # one number a row
        weights = 4 * self.rows * lanes(max(self.chunks, self.own, self.tile)) * 4
        fetched = 2 * 2 * head_rows * d * (self.chunks * bytes_bank + self.own * bytes_q)
        streaming = 2 * 2 * query * bytes_q + 2 * query * 4 + fetched + (4 * kv_heads + 8) * columns
        owning = 2 * 2 * query * bytes_q + 4 * columns + 4 * self.tile * head_rows * d * (bytes_bank + 4 + 2)
        return max(streaming, owning) + weights


def choose(
    tokens: int,
    own: int,
    group: int,
    kv_heads: int,
    head_dim: int,
    longest: int,
    bytes_q: int,
    bytes_bank: int,
    budget: int,
) -> Blocks | None:
    """The largest blocks whose `vmem_bytes` fit in `budget`, or None.

    Args:
      tokens, own: T, S; longest: the most chunks a document has.
    """
    step = _ROW_TILE // math.gcd(_ROW_TILE, group)
    decoding = tokens * group <= _FEW_ROWS
    most_chunks, most_own = (_MAX_CHUNKS_DECODING, _MAX_OWN_DECODING) if decoding else (_MAX_CHUNKS, _MAX_OWN)
    chunks = min(most_chunks, max(_ROW_TILE, -(-longest // _ROW_TILE) * _ROW_TILE))
    # A cache is padded, that is copied, unless it is a multiple of what is read at once.
    own_block = math.gcd(most_own, lanes(own)) if own else LANES
    most = -(-tokens // step) * step
    block = max(step, min(most, _MAX_ROWS // group // step * step))
    while True:
        # Blocks of one size: as few as `block` allows, then as small as that many allow.
        count = -(-tokens // block)
        even = -(-tokens // (count * step)) * step
        blocks = Blocks(tokens=even, group=group, chunks=chunks, own=own_block, tile=LANES)
        if blocks.vmem_bytes(kv_heads, head_dim, bytes_q, bytes_bank) <= budget:
            return blocks
        if block == step:
            return None
        block = max(step, block // 2 // step * step)
