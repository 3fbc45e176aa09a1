"""Documents of RULER's haystacks: text, noise or needles, cut to fit, with their needles in place."""

from collections.abc import Iterator, Sequence

import numpy as np

from msa_jax.data.haystacks.passages import Passages, Windows, named
from msa_jax.data.haystacks.ruler_tasks import KEY_FORMAT, NOISE, TASKS, VALUE_DIGITS
from msa_jax.data.haystacks.uuids import draw_uuids
from msa_jax.data.records import Document
from msa_jax.data.samples import Renderer
from msa_jax.data.splits import Split
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError


class RulerDocuments:
    """Makes documents of a haystack and of needles, of at most `document_tokens` tokens when rendered.

    Text is cut into passages (`Windows`), a needle put in at a word's start; noise is whole lines, a needle on a line
    of its own among them; of a haystack of needles every line is a document.

    Attributes:
      passages: of the split's text, the first time through it.
    Raises:
      DataError: needles or noise do not fit `document_tokens`, or the split has too little text.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: Tokenizer, document_tokens: int, split: Split, eval_fraction: float
    ):
        self._tokenizer, self._split = tokenizer, split
        self._body_len = Renderer(tokenizer, document_tokens).body_len
        self._windows = Windows(texts, tokenizer, self._body_len, split, eval_fraction)
        self.passages = self._windows.turn(0)
        self._noise_lines = self._count_noise()

    def stretches(
        self, rng: np.random.Generator, haystack: str, count: int, block_size: int
    ) -> Iterator[tuple[Passages, np.ndarray]]:
        """(passages, chosen of them) for `count` documents, `block_size` at a time; text turn by turn."""
        turn, left = 0, count
        while left:
            passages = self.passages if turn == 0 or haystack != "essay" else self._windows.turn(turn)
            if not len(passages):
                raise DataError(f"the {self._split} split's text makes {count - left} documents; give more text")
            order = rng.permutation(len(passages)) if haystack == "essay" else np.zeros(left, np.int64)
            for begin in range(0, min(left, len(order)), block_size):
                yield passages, order[begin : min(begin + block_size, left)]
            left -= min(left, len(order))
            turn += 1

    def bodies(
        self, rng: np.random.Generator, haystack: str, passages: Passages, chosen: np.ndarray, needles: Sequence[str]
    ) -> list[np.ndarray]:
        """Documents' text as tokens, of the `chosen` passages if of text; `needles` has "" where there is none."""
        if haystack == "essay":
            encoded = iter(self._tokenizer.encode_batch([" " + n for n in needles if n]))
            return passages.bodies(rng, chosen, [next(encoded) if n else [] for n in needles])
        texts = list(needles)
        if haystack == "noise":
            texts = ["\n".join(self._noise(rng, needle)) for needle in needles]
        distinct = list(dict.fromkeys(texts))
        encoded = dict(zip(distinct, self._tokenizer.encode_batch([" " + t for t in distinct]), strict=True))
        return [np.asarray(encoded[text], np.int32) for text in texts]

    def _noise(self, rng: np.random.Generator, needle: str) -> list[str]:
        """Lines of a document of noise, the needle on a line of its own at random."""
        if not needle:
            return [NOISE] * self._noise_lines
        room = self._body_len - len(self._tokenizer.encode(" " + needle))
        lines = [NOISE] * max(0, min(self._noise_lines, room // self._noise_line_len))
        lines.insert(int(rng.integers(0, len(lines) + 1)), needle)
        return lines

    def _count_noise(self) -> int:
        self._noise_line_len = len(self._tokenizer.encode(f"\n {NOISE}"))
        if self._noise_line_len > self._body_len:
            raise DataError(
                f"a line of noise takes {self._noise_line_len} tokens and documents have {self._body_len} for text; "
                f"raise document_tokens by {self._noise_line_len - self._body_len}"
            )
        return self._body_len // self._noise_line_len

    def documents(self, numbers: Sequence[int], bodies: Sequence[np.ndarray]) -> list[Document]:
        """Documents named by their numbers."""
        return named(self._tokenizer, numbers, bodies)

    def check_needles(self, tasks: Sequence[str], words: dict[str, Sequence[str]]) -> None:
        """Raises DataError when needles of a task, with the longest words, do not fit a document."""
        longest = {
            field: max(zip(self._tokenizer.encode_batch(own), own, strict=True), key=lambda pair: len(pair[0]))[1]
            for field, own in words.items()
        }
        keys = {"words": KEY_FORMAT.format(**longest), "uuids": draw_uuids(np.random.default_rng(0), 1)[0]}
        values = {"numbers": "1" * VALUE_DIGITS, "uuids": keys["uuids"]}
        for name in tasks:
            task = TASKS[name]
            needed = len(self._tokenizer.encode(" " + task.needle(keys[task.key], values[task.value])))
            if needed > self._body_len:
                raise DataError(
                    f"documents have {self._body_len} tokens for text and a needle of {name} takes up to {needed}; "
                    f"raise document_tokens by {needed - self._body_len} or more"
                )
