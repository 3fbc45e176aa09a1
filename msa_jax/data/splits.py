"""How questions are split, and numbers drawn, the same way for all sources."""

import hashlib
from typing import Literal, get_args

import numpy as np

from msa_jax.errors import DataError

Split = Literal["train", "eval"]


def check_split(split: str, eval_fraction: float) -> None:
    """Raises DataError unless the split exists and the fraction leaves something on both sides."""
    if split not in get_args(Split):
        raise DataError(f'split must be "train" or "eval", got {split!r}')
    if not 0 < eval_fraction < 1:
        raise DataError(f"eval_fraction must lie between 0 and 1, got {eval_fraction}")


def stable_hash(key: str | bytes) -> int:
    """64-bit hash that is the same on every machine and in every process."""
    data = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def in_split(key: str | bytes, split: Split, eval_fraction: float) -> bool:
    """Whether what `key` names belongs to `split`: decided by the key alone, so it never moves."""
    return (stable_hash(key) < eval_fraction * 2**64) == (split == "eval")


def draw_numbers(rng: np.random.Generator, count: int, id_digits: int) -> np.ndarray:
    """Distinct document numbers, int64 [count], out of 0..10**id_digits - 1; raises DataError if there are too few."""
    limit = 10**id_digits
    if count > limit:
        raise DataError(f"{count} documents cannot have distinct numbers of {id_digits} digits; raise id_digits")
    if count * 2 > limit:
        return rng.permutation(limit)[:count]
    found = np.empty(0, np.int64)
    while len(found) < count:
        found = first_unique(np.concatenate([found, rng.integers(0, limit, count + 16)]))
    return found[:count]


def first_unique(values: np.ndarray) -> np.ndarray:
    """The distinct values in order of first appearance."""
    return values[np.sort(np.unique(values, return_index=True)[1])]
