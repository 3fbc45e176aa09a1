"""Needle keys: tuples of words, drawn without repetition, some easily confused, split by stable hash."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter

import numpy as np

from msa_jax.data.splits import Split, first_unique, stable_hash
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError

_WORD = re.compile(r"(?<![^\s])[a-z]{3,10}(?![a-z])")


def common_words(texts: Iterable[str], count: int) -> list[str]:
    """The `count` most frequent lower-case words of 3 to 10 letters, ties in alphabetical order."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text))
    return sorted(counts, key=lambda word: (-counts[word], word))[:count]


def frequent_words(texts: Iterable[str], tokenizer: Tokenizer, count: int, key_format: str = "{a}-{n}") -> list[str]:
    """The `count` most frequent words that are one token each wherever `key_format` puts them.

    Raises DataError when the texts have fewer such words; a larger vocabulary makes more.
    """
    words = common_words(texts, 50 * count)
    fields = key_fields(key_format)
    # Each by itself: two that would meet without the words between them might be one token.
    literal = sum(len(tokenizer.encode(text.strip())) for text, *_ in Formatter().parse(key_format))
    keys = tokenizer.encode_batch([" " + key_format.format(**dict.fromkeys(fields, word)) for word in words])
    found = [word for word, key in zip(words, keys, strict=True) if len(key) <= literal + len(fields)]
    if len(found) < count:
        raise DataError(
            f"only {len(found)} words of the texts are single tokens in keys like {key_format!r}, {count} "
            "are wanted; train the tokenizer with a larger vocab_size, give more text, or ask for fewer words"
        )
    return found[:count]


def key_fields(key_format: str) -> list[str]:
    """Names of the words a key is made of, in order; raises DataError when there are none or one repeats."""
    fields = [name for _, name, _, _ in Formatter().parse(key_format) if name is not None]
    if not fields or "" in fields or len(set(fields)) != len(fields):
        raise DataError(f"key_format must name its words, like '{{a}}-{{n}}', each once; got {key_format!r}")
    return fields


class KeyPool:
    """All keys of `key_format` over `words`. The eval split asks for keys that training never uses.

    `words` are those of every field, or by field. Raises DataError when a field's words repeat or are fewer than two.
    """

    def __init__(
        self, words: Sequence[str] | Mapping[str, Sequence[str]], key_format: str, split: Split, eval_fraction: float
    ):
        self.key_format = key_format
        self.fields = key_fields(key_format)
        self.words = [list(words[field] if isinstance(words, Mapping) else words) for field in self.fields]
        for own in self.words:
            if len(set(own)) != len(own) or len(own) < 2:
                raise DataError(f"words must be distinct and at least two, got {len(own)}")
        self._split = split
        self._threshold = np.uint64(int(eval_fraction * 2**64))
        self._hashes = [np.array([stable_hash(word) for word in own], np.uint64) for own in self.words]

    @property
    def size(self) -> int:
        """Number of keys of both splits."""
        return math.prod(map(len, self.words))

    def format(self, words: np.ndarray) -> list[str]:
        """Keys as text, of word indices [n, fields]."""
        columns = [[own[i] for i in column] for own, column in zip(self.words, words.T.tolist(), strict=True)]
        keys = (dict(zip(self.fields, key, strict=True)) for key in zip(*columns, strict=True))
        return [self.key_format.format(**key) for key in keys]

    def draw(self, rng: np.random.Generator, asked: int, others: int, hard_fraction: float) -> np.ndarray:
        """Distinct keys, word indices int64 [asked + others, fields], the asked ones first.

        `hard_fraction` of them come from a pool of as few words as can hold them, so each shares words with
        many.
        Raises DataError when there are not that many keys.
        """
        hard_asked, hard_others = round(hard_fraction * asked), round(hard_fraction * others)
        hard = self._hard(rng, hard_asked, hard_others)
        used = np.concatenate(hard)
        easy_asked = self._easy(rng, asked - len(hard[0]), used, self._is_own)
        used = np.concatenate([used, easy_asked])
        easy_others = self._easy(rng, others - len(hard[1]), used, self._may_distract)
        codes = np.concatenate(
            [
                rng.permutation(np.concatenate([hard[0], easy_asked])),
                rng.permutation(np.concatenate([hard[1], easy_others])),
            ]
        )
        return self._decode(codes)

    def _hard(self, rng: np.random.Generator, asked: int, others: int) -> tuple[np.ndarray, np.ndarray]:
        shared = rng.permutation(max(map(len, self.words)))
        # Words that all fields share are in one order, so that a key may have one of them in any place.
        orders = [shared[shared < len(own)] for own in self.words]
        width, most = len(self.fields), len(shared)
        size = min(most, max(2, int(np.ceil((1.5 * (asked + others)) ** (1 / width)))))
        while True:
            grid = np.meshgrid(*[order[:size] for order in orders], indexing="ij")
            codes = rng.permutation(self._encode(np.stack(grid, -1).reshape(-1, width)))
            own = self._is_own(codes)
            first = codes[own][:asked]
            rest = codes[self._may_distract(codes) & ~np.isin(codes, first)][:others]
            if (len(first) == asked and len(rest) == others) or size == most:
                return first, rest
            size = min(most, size + max(1, size // 4))

    def _easy(self, rng: np.random.Generator, count: int, used: np.ndarray, allowed) -> np.ndarray:
        found = np.empty(0, np.int64)
        exhaustive = self.size <= 64 * count
        for _ in range(1 if exhaustive else 64):
            if len(found) >= count:
                break
            drawn = rng.permutation(self.size) if exhaustive else rng.integers(0, self.size, 2 * count + 64)
            drawn = drawn[allowed(drawn)]
            found = first_unique(np.concatenate([found, drawn[~np.isin(drawn, used)]]))
        if len(found) < count:
            raise DataError(
                f"{max(map(len, self.words))} words make {self.size} keys {self.key_format!r}, too few here ({count} "
                f"more are wanted of the {self._split} split); give more words, or a key_format with more "
                "of them"
            )
        return found[:count]

    def _is_own(self, codes: np.ndarray) -> np.ndarray:
        mixed = np.zeros(len(codes), np.uint64)
        for hashes, column in zip(self._hashes, self._decode(codes).T, strict=True):
            mixed = (mixed ^ hashes[column]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        return (mixed < self._threshold) == (self._split == "eval")

    def _may_distract(self, codes: np.ndarray) -> np.ndarray:
        return self._is_own(codes) if self._split == "train" else np.ones(len(codes), bool)

    def _encode(self, words: np.ndarray) -> np.ndarray:
        codes = np.zeros(len(words), np.int64)
        for own, column in zip(self.words, words.T, strict=True):
            codes = codes * len(own) + column
        return codes

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        columns = []
        for own in reversed(self.words):
            codes, column = np.divmod(codes, len(own))
            columns.append(column)
        return np.stack(columns[::-1], -1)
