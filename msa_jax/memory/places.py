"""Where documents' chunks lie: all the arithmetic of placing documents one behind the other, in parts, with room.

Sizes: n texts, S parts in which places are counted, one for each device that shares a bank.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

# Capacities are a power of two times one of these, so that a growing bank is compiled for seldom and wastes at
# most a fifth.
_STEPS = (8, 10, 12, 14)


def capacity_for(size: int, *, multiple: int = 128) -> int:
    """The smallest capacity of at least `size` that banks are padded to, a multiple of `multiple`."""
    capacities = (-(-(step << power) // multiple) * multiple for power in itertools.count() for step in _STEPS)
    return next(capacity for capacity in capacities if capacity >= size)


def behind(lengths: np.ndarray, first: int = 0) -> np.ndarray:
    """Starts [n] of texts of so many chunks, one behind the other from chunk `first` on."""
    return first + np.cumsum(lengths) - lengths


def chunks_of(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Chunk numbers of ranges [n], one range after another."""
    return np.arange(lengths.sum()) + np.repeat(starts - behind(lengths), lengths)


def in_parts(
    lengths: np.ndarray,
    shares: Sequence[slice],
    documents: np.ndarray,
    chunks: np.ndarray,
    part_documents: int,
    part_chunks: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The place of each text among documents, and its first chunk, both [n]: behind what is in its part.

    Args:
      lengths: [n] chunks of each text.
      shares: S slices of the texts, which part gets which; together all of them.
      documents, chunks: [S] places that are taken in each part, its first ones.
      part_documents, part_chunks: places that a part has.
    """
    places, starts = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    for part, share in enumerate(shares):
        places[share] = part * part_documents + documents[part] + np.arange(len(lengths[share]))
        starts[share] = behind(lengths[share], part * part_chunks + chunks[part])
    return places, starts


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
