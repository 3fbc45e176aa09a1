"""Real text cut into passages of tokens, into which needles can be put between words."""

from collections.abc import Iterable, Sequence

import numpy as np

from msa_jax.data.records import Document
from msa_jax.data.splits import Split, in_split
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError


class Passages:
    """Passages of tokens that begin and end at a word's start.

    Attributes:
      passages: int32 [n, size + 1], rows filled up with 0.
      lengths: int64 [n], in tokens.
      word_before: int32 [n, size + 1]; at [p, i] the last place <= i where passage p may be cut.
    """

    def __init__(self, passages: Sequence[np.ndarray], starts_word: np.ndarray, size: int):
        """Of token lists of at most `size` tokens; `starts_word` bool [V], tokens before which a cut may fall."""
        self.size = size
        self.lengths = np.array([len(p) for p in passages], np.int64)
        self.passages = np.zeros((len(passages), size + 1), np.int32)
        place = np.arange(size + 1)
        self.passages[place < self.lengths[:, None]] = np.concatenate([*passages, np.zeros(0, np.int32)])
        may_cut = starts_word[self.passages]
        may_cut[place == self.lengths[:, None]] = True
        may_cut[place > self.lengths[:, None]] = False
        self.word_before = np.maximum.accumulate(np.where(may_cut, place, 0), axis=1).astype(np.int32)

    def __len__(self) -> int:
        return len(self.passages)

    @classmethod
    def joined(cls, parts: Sequence["Passages"]) -> "Passages":
        """All passages of several, which have one size."""
        joined = cls.__new__(cls)
        joined.size = parts[0].size
        for name in ("lengths", "passages", "word_before"):
            setattr(joined, name, np.concatenate([getattr(part, name) for part in parts]))
        return joined

    def bodies(
        self, rng: np.random.Generator, chosen: np.ndarray, needles: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """The `chosen` passages, each with its needle (empty for none) at the start of a word drawn by `rng`.

        A passage is cut at a word's start so that both have at most `size` tokens together.
        """
        sizes = np.array([len(needle) for needle in needles], np.int64)
        pieces = np.fromiter((t for needle in needles for t in needle), np.int32)
        cut = self.word_before[chosen, np.minimum(self.size - sizes, self.lengths[chosen])]
        depth = self.word_before[chosen, rng.integers(0, cut + 1)]
        lengths = cut + sizes
        row = np.repeat(np.arange(len(chosen)), lengths)
        ends = np.cumsum(lengths)
        at = np.arange(len(row)) - (ends - lengths)[row]
        inside = at - depth[row]  # place within the needle, if 0 <= inside < its size
        is_needle = (inside >= 0) & (inside < sizes[row])
        tokens = self.passages[chosen[row], np.where(inside < 0, at, np.maximum(at - sizes[row], 0))]
        tokens[is_needle] = pieces[((np.cumsum(sizes) - sizes)[row] + inside)[is_needle]]
        return np.split(tokens, ends[:-1])


class Haystack(Passages):
    """The passages of one split, whole words of `size // 2` to `size` tokens each, by stable hash.

    Cuts fall only before tokens that begin a word with its space, so that the tokens on both sides stay as
    the tokenizer would write them.

    Raises:
      DataError: when the split gets no passage.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer, size: int, split: Split, eval_fraction: float):
        starts_word = word_starts(tokenizer)
        encoded = tokenizer.encode_batch([" " + text for text in texts])
        passages = [p for ids in encoded for p in _cut(np.asarray(ids, np.int32), starts_word, size)]
        own = [p for p in passages if in_split(p.tobytes(), split, eval_fraction)]
        if not own:
            raise DataError(
                f"the haystack has {len(passages)} passages of about {size} tokens and none is in the "
                f"{split} split; give more text"
            )
        super().__init__(own, starts_word, size)


def named(tokenizer: Tokenizer, numbers: Sequence[int], bodies: Sequence[np.ndarray]) -> list[Document]:
    """Documents of these tokens of text, named by their numbers."""
    texts = tokenizer.decode_batch(bodies)
    return [Document(str(n), "", text[1:], b) for n, text, b in zip(numbers, texts, bodies, strict=True)]


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """Bool [V]: tokens that begin a word with its space."""
    spelt = tokenizer.decode_batch([[i] for i in range(tokenizer.vocab_size)])
    return np.array([text[:1] == " " and len(text) > 1 for text in spelt])


def _cut(tokens: np.ndarray, starts_word: np.ndarray, size: int) -> list[np.ndarray]:
    bounds = np.concatenate([[0], np.flatnonzero(starts_word[tokens]), [len(tokens)]])
    passages = []
    begin = 0
    while begin < len(tokens):
        end = int(bounds[np.searchsorted(bounds, begin + size, "right") - 1])
        if end - begin >= max(1, size // 2):
            passages.append(tokens[begin:end])
        # What is too short, or one endless word, is left out.
        begin = end if end > begin else int(bounds[np.searchsorted(bounds, begin, "right")])
    return passages


class Windows:
    """Text of one split, or all, as one stream, cut into passages again and again, each time at other places.

    Texts belong to splits by stable hash; without a split they all take part. `turn(r)` gives the passages of the r-th
    time through the text. They begin at words at which no earlier turn's began; when every word has had its turn, all
    begin anew and are one word shorter. So no two are the same stretch of text.

    Raises:
      DataError: when the split's texts have no passage of `size` tokens.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: Tokenizer, size: int, split: Split | None, eval_fraction: float
    ):
        own = [text for text in texts if split is None or in_split(text, split, eval_fraction)]
        encoded = tokenizer.encode_batch([" " + text for text in own])
        self._tokens = np.concatenate([*(np.asarray(ids, np.int32) for ids in encoded), np.zeros(0, np.int32)])
        self._starts_word, self._size = word_starts(tokenizer), size
        self._bounds = np.concatenate([[0], np.flatnonzero(self._starts_word[self._tokens])])
        # Words a passage has on average: passages that begin so many apart cover the text about once.
        self._words = max(1, round(size * len(self._bounds) / max(1, len(self._tokens))))
        if not len(self.turn(0)):
            raise DataError(
                f"{len(own)} of the haystack's {len(texts)} texts are in the {split or 'only'} split and make no "
                f"passage of {size} tokens; give more text"
            )

    def turn(self, index: int) -> Passages:
        """The passages of the index-th time through the text, in the text's order, `size // 2` tokens at least."""
        shorter, shift = divmod(index, self._words)
        words = np.arange(shift, len(self._bounds), self._words)
        begins = self._bounds[words]
        last = np.searchsorted(self._bounds, begins + self._size, "right") - 1 - shorter
        ends = self._bounds[np.maximum(last, words)]
        kept = (ends - begins >= max(1, self._size // 2)) & (begins + self._size <= len(self._tokens))
        spans = zip(begins[kept].tolist(), ends[kept].tolist(), strict=True)
        return Passages([self._tokens[a:b] for a, b in spans], self._starts_word, self._size)
