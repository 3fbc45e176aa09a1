"""Block sizes of the TPU kernels of `chunk_scores`, from one description of their use of VMEM."""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.tpu_chip import SUBLANES, lanes, sublanes

# Rows of routing tokens in one block: above this the matrix unit, not memory, sets the pace.
_MAX_ROWS = 512
# A tile of keys this large hides the cost of a grid step; larger ones gain nothing.
_TILE_BYTES = 4 << 20
_TILES = (2048, 1024, 512, 256, 128)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the routing tokens and chunks are cut.

    Attributes:
      questions: questions in one block of rows.
      tokens: routing tokens of a question, padded.
      token_major: rows ordered [tokens, questions] (many questions of few tokens), else [questions, tokens].
      tile: chunks in one tile.
    """

    questions: int
    tokens: int
    token_major: bool
    tile: int

    @property
    def rows(self) -> int:
        return self.questions * self.tokens

    def vmem_bytes(self, width: int, query_bytes: int, key_bytes: int) -> int:
        """VMEM of the hungriest kernel: what the pipeline double-buffers, and the values of one step.

        Args:
          width: M, the router width.
          query_bytes, key_bytes: bytes of one element.
        """
        m = lanes(width)
        buffers = 2 * (
            self.rows * m * query_bytes  # queries
            + self.rows * lanes(1) * 4  # scale and mask of every row
            + self.tile * m * key_bytes  # keys
            + 2 * sublanes(self.questions) * self.tile * 4  # scores and winners
        )
        # The products and the one-hot rows, keys in the type of the product, one gradient in float32.
        values = 3 * self.rows * self.tile * 4 + self.tile * m * max(query_bytes, key_bytes)
        return buffers + values + 3 * max(self.rows, self.tile) * m * 4


def choose(
    batch: int, tokens: int, num_chunks: int, width: int, query_bytes: int, key_bytes: int, budget: int
) -> Blocks | None:
    """The largest blocks whose `vmem_bytes` fit in `budget`, or None."""
    token_rows, question_rows = tokens * sublanes(batch), batch * sublanes(tokens)
    token_major = token_rows < question_rows and tokens * SUBLANES <= _MAX_ROWS
    if token_major:
        per_block = _MAX_ROWS // tokens // SUBLANES * SUBLANES
        questions = min(sublanes(batch), per_block)
    else:
        tokens = sublanes(tokens)
        blocks = math.ceil(batch / max(1, _MAX_ROWS // tokens))
        questions = math.ceil(batch / blocks)
    tiles = [tile for tile in _TILES if tile < num_chunks] or [_TILES[-1]]
    for tile in tiles:
        blocks = Blocks(questions, tokens, token_major, tile if tile < num_chunks else num_chunks)
        small_enough = tile * width * key_bytes <= _TILE_BYTES or tile == tiles[-1]
        if small_enough and blocks.vmem_bytes(width, query_bytes, key_bytes) <= budget:
            return blocks
    return None
