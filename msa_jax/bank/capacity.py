"""How much room a bank gets on devices, and which documents go to which of them."""

from __future__ import annotations

import bisect
import itertools

import numpy as np

# Capacities are a power of two times one of these, so that a growing bank is compiled for seldom and wastes at
# most a fifth.
_STEPS = (8, 10, 12, 14)


def capacity_for(size: int, *, multiple: int = 128) -> int:
    """The smallest capacity of at least `size` that banks are padded to, a multiple of `multiple`."""
    power = 0
    while True:
        for step in _STEPS:
            capacity = -(-(step << power) // multiple) * multiple
            if capacity >= size:
                return capacity
        power += 1


def shares_of(
    lengths: np.ndarray, chunks: np.ndarray, documents: np.ndarray, part_chunks: int, part_documents: int
) -> list[slice] | None:
    """Which texts each part gets: a run of them, as long as fills the parts with most room to one level.

    Texts that follow each other on disk stay together, so that a part is read in few pieces and none of them twice.

    Args:
      lengths: [n] chunks of each text, at least 1.
      chunks, documents: [S] places that are taken in each part.
      part_chunks, part_documents: places that a part has.

    Returns:
      S slices of the texts; None if they do not fit.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    order = np.argsort(chunks, kind="stable")

    def bounds(level):
        """Where the run of each part ends, in `order`, when none is filled beyond `level` chunks."""
        at = [0]
        for part in order:
            most = ends[at[-1]] + max(0, level - chunks[part])
            last = np.searchsorted(ends, most, side="right") - 1
            at.append(min(int(last), at[-1] + part_documents - int(documents[part])))
        return at

    level = bisect.bisect_left(range(part_chunks + 1), True, key=lambda level: bounds(level)[-1] == len(lengths))
    if level > part_chunks:
        return None
    shares = [slice(0, 0)] * len(chunks)
    for part, run in zip(order, itertools.pairwise(bounds(level)), strict=True):
        shares[part] = slice(*run)
    return shares
