"""Real text cut into passages of tokens, into which needles can be put between words."""

from collections.abc import Iterable

import numpy as np

from msa_jax.data.records import DataError
from msa_jax.data.sources.base import Split, in_split
from msa_jax.data.tokenizer import Tokenizer


class Haystack:
    """The passages of one split, whole words of `size // 2` to `size` tokens each, by stable hash.

    Cuts fall only before tokens that begin a word with its space, so that the tokens on both sides stay as
    the tokenizer would write them.

    Attributes:
      passages: int32 [n, size + 1], rows filled up with 0.
      lengths: int64 [n], in tokens.
      word_before: int32 [n, size + 1]; at [p, i] the last place <= i where passage p may be cut.
    Raises:
      DataError: when the split gets no passage.
    """

    def __init__(
        self, texts: Iterable[str], tokenizer: Tokenizer, size: int, split: Split, eval_fraction: float
    ):
        spelt = tokenizer.decode_batch([[i] for i in range(tokenizer.vocab_size)])
        self._starts_word = np.array([text[:1] == " " and len(text) > 1 for text in spelt])
        encoded = tokenizer.encode_batch([" " + text for text in texts])
        passages = [p for ids in encoded for p in self._cut(np.asarray(ids, np.int32), size)]
        own = [p for p in passages if in_split(p.tobytes(), split, eval_fraction)]
        if not own:
            raise DataError(
                f"the haystack has {len(passages)} passages of about {size} tokens and none is in the "
                f"{split} split; give more text"
            )
        self.lengths = np.array([len(p) for p in own])
        self.passages = np.zeros((len(own), size + 1), np.int32)
        for row, passage in zip(self.passages, own, strict=True):
            row[: len(passage)] = passage
        place = np.arange(size + 1)
        may_cut = self._starts_word[self.passages]
        may_cut[place == self.lengths[:, None]] = True
        may_cut[place > self.lengths[:, None]] = False
        self.word_before = np.maximum.accumulate(np.where(may_cut, place, 0), axis=1).astype(np.int32)

    def __len__(self) -> int:
        return len(self.passages)

    def _cut(self, tokens: np.ndarray, size: int) -> list[np.ndarray]:
        bounds = np.concatenate([[0], np.flatnonzero(self._starts_word[tokens]), [len(tokens)]])
        passages = []
        begin = 0
        while begin < len(tokens):
            end = int(bounds[np.searchsorted(bounds, begin + size, "right") - 1])
            if end - begin >= max(1, size // 2):
                passages.append(tokens[begin:end])
            # What is too short, or one endless word, is left out.
            begin = end if end > begin else int(bounds[np.searchsorted(bounds, begin, "right")])
        return passages
