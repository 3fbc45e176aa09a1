"""Needles in haystacks, in RULER's form: real text, each document with one made-up fact inserted in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from msa_jax.data.haystacks.keys import KeyPool, common_words, frequent_words, key_fields
from msa_jax.data.haystacks.passages import Haystack, Passages, Windows, named
from msa_jax.data.haystacks.settings import HaystackSettings
from msa_jax.data.records import Document, Episode, Question
from msa_jax.data.samples import Renderer
from msa_jax.data.splits import Split, check_split, draw_numbers
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError

if TYPE_CHECKING:
    from msa_jax.data.batch_config import BatchConfig

NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
VALUE_DIGITS = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(HaystackSettings):
    """Needles whose keys are made of the haystack's own words.

    Attributes:
      num_words: the commonest words, which keys are made of.
      key_format: how, each word's name in braces; "{a}-{b}-{n}" makes keys of three words.
    """

    num_words: int = 256
    key_format: str = "{a}-{n}"

    def texts(self, data: BatchConfig) -> Iterator[str]:
        return training_texts(self.haystack(), num_words=self.num_words, key_format=self.key_format)

    def build(self, data: BatchConfig, tokenizer: Tokenizer, split: Split) -> NeedleSource:
        texts = self.haystack()
        return NeedleSource(
            texts, frequent_words(texts, tokenizer, self.num_words, self.key_format), tokenizer,
            document_tokens=data.document_len, split=split, eval_fraction=data.eval_fraction,
            hard_fraction=self.hard_fraction, needle_fraction=self.needle_fraction, key_format=self.key_format,
        )  # fmt: skip


def training_texts(
    haystack_texts: Iterable[str], *, key_format: str = "{a}-{n}", num_words: int = 256
) -> Iterator[str]:
    """What to train a tokenizer on: the haystack, and the frames and keys of its `num_words` commonest words.

    Frames and keys come as often as BPE needs to give a frequent word one token in both places of a key.
    """
    texts = list(haystack_texts)
    yield from texts
    words = common_words(texts, num_words) or ["word"]
    fields = key_fields(key_format)
    length = sum(map(len, texts))
    keys = [
        key_format.format(**{field: words[(i + j) % len(words)] for j, field in enumerate(fields)})
        for i in range(len(words))
    ]
    for i in range(64 + length // 4000):
        yield " " + NEEDLE.format(key=keys[i % len(keys)], value="0")
        yield QUESTION.format(key=keys[i % len(keys)])
    for _ in range(1 + length // 20000):
        yield " " + " ".join(keys)


class NeedleSource:
    """Documents of `haystack_texts`, cut into passages, each with the needle of one key; asks for needles.

    A slot is a passage: `indices` of an episode pick the passages that carry the needles asked for. Every
    rendered document has at most `document_tokens` tokens; needles are never cut. Passages are split by
    stable hash, and so are keys: no key that eval asks for occurs in training. Of the other documents
    `needle_fraction` carry needles too. `hard_fraction` of the keys share their words with many other keys
    (see KeyPool.draw).
    Raises DataError when a share is none, needles do not fit, or the split has no passage.
    """

    def __init__(
        self,
        haystack_texts: Iterable[str],
        words: Sequence[str],
        tokenizer: Tokenizer,
        *,
        document_tokens: int,
        split: Split = "train",
        eval_fraction: float = 0.1,
        key_format: str = "{a}-{n}",
        hard_fraction: float = 0.75,
        needle_fraction: float = 1.0,
    ):
        check_split(split, eval_fraction)
        for name, share in (("hard_fraction", hard_fraction), ("needle_fraction", needle_fraction)):
            if not 0 <= share <= 1:
                raise DataError(f"{name} must be in 0..1, got {share}")
        self.keys = KeyPool(words, key_format, split, eval_fraction)
        self._tokenizer, self._split = tokenizer, split
        self._hard_fraction, self._needle_fraction = hard_fraction, needle_fraction
        self._haystack_texts = list(haystack_texts)
        self._body_len = Renderer(tokenizer, document_tokens).body_len
        self._check_needle(document_tokens)
        self._haystack = Haystack(self._haystack_texts, tokenizer, self._body_len, split, eval_fraction)

    def __len__(self) -> int:
        return len(self._haystack)

    def episode(
        self, indices: Sequence[int], num_documents: int, rng: np.random.Generator, id_digits: int = 7
    ) -> Episode:
        """See `Source.episode`. Each index makes a document and the question about its needle."""
        if len(indices) > num_documents:
            raise DataError(f"{len(indices)} questions need as many documents and num_documents is {num_documents}")
        if num_documents > len(self):
            raise DataError(
                f"num_documents is {num_documents} and the {self._split} split has {len(self)} passages; "
                f"give more haystack text, or use NeedleSource.memory, which cuts it at other places too"
            )
        others = self._other_passages(rng, np.asarray(indices), num_documents - len(indices))
        passages = np.concatenate([indices, others])
        questions, blocks = self._make(
            rng, passages, len(indices), id_digits, num_documents, self._haystack, num_documents
        )
        documents, numbers = next(blocks)
        return Episode(documents, numbers, questions)

    def memory(
        self,
        num_documents: int,
        num_questions: int,
        rng: np.random.Generator,
        *,
        id_digits: int = 7,
        block_size: int = 4096,
        needle_documents: int | None = None,
    ) -> tuple[list[Question], Iterator[tuple[list[Document], list[int]]]]:
        """See `Source.memory`. Keys are distinct too.

        When the split's passages run out, windows of all the haystack's text follow, no two of which are the same
        stretch of it: text that training has seen, with needles that it has not. Text is made as blocks of
        `block_size` documents are asked for.

        Args:
          needle_documents: the documents asked for lie among the first so many; default all. Memories of several
            sizes can so be the beginnings of one.
        """
        first = num_documents if needle_documents is None else needle_documents
        if not num_questions <= first <= num_documents:
            raise DataError(
                f"{num_questions} questions need as many documents, there are {first} of {num_documents} for them"
            )
        haystack = self._haystack if num_documents <= len(self) else self._enough(num_documents)
        passages = rng.permutation(len(haystack))[:num_documents]
        return self._make(rng, passages, num_questions, id_digits, block_size, haystack, first)

    def _enough(self, count: int) -> Passages:
        """At least so many passages: the split's, then windows."""
        windows = Windows(self._haystack_texts, self._tokenizer, self._body_len, None, 0.0)
        found, turn = [self._haystack], 0
        while sum(map(len, found)) < count:
            found.append(windows.turn(turn))
            turn += 1
        return Passages.joined(found)

    def _make(
        self,
        rng: np.random.Generator,
        passages: np.ndarray,
        asked: int,
        id_digits: int,
        block_size: int,
        haystack: Passages,
        first: int,
    ):
        """The first `asked` of `passages` carry the needles asked for; documents come in random order.

        Those asked for are among the first `first`.
        """
        count = len(passages)
        carriers = asked + round(self._needle_fraction * (count - asked))
        words = self.keys.draw(rng, asked, carriers - asked, self._hard_fraction)
        values = rng.integers(0, 10, (carriers, VALUE_DIGITS))
        numbers = draw_numbers(rng, count, id_digits)
        others = asked + rng.permutation(count - asked)
        near = np.concatenate([np.arange(asked), others[: first - asked]])
        order = np.concatenate([rng.permutation(near), others[first - asked :]])
        later = np.random.default_rng(rng.integers(0, 2**63, 2))  # blocks are made when the caller likes
        questions = [
            Question(
                id=f"{self._split}:{passage}:{key}",
                question=QUESTION.format(key=key),
                answers=("".join(map(str, value)),),
                supporting_ids=(str(number),),
            )
            for passage, key, value, number in zip(
                passages[:asked].tolist(),
                self.keys.format(words[:asked]),
                values[:asked].tolist(),
                numbers[:asked].tolist(),
                strict=True,
            )
        ]

        def blocks() -> Iterator[tuple[list[Document], list[int]]]:
            for begin in range(0, count, block_size):
                some = order[begin : begin + block_size]
                carrying = some[some < carriers]
                needles = iter(self._tokenizer.encode_batch(self._needle_texts(words[carrying], values[carrying])))
                bodies = haystack.bodies(
                    later, passages[some], [next(needles) if i < carriers else [] for i in some.tolist()]
                )
                chosen = numbers[some].tolist()
                yield named(self._tokenizer, chosen, bodies), chosen

        return questions, blocks()

    def _needle_texts(self, words: np.ndarray, values: np.ndarray) -> list[str]:
        keys = self.keys.format(words)
        digits = ["".join(map(str, value)) for value in values.tolist()]
        return [" " + NEEDLE.format(key=k, value=v) for k, v in zip(keys, digits, strict=True)]

    def _other_passages(self, rng: np.random.Generator, taken: np.ndarray, count: int) -> np.ndarray:
        drawn = rng.choice(len(self), min(len(self), count + len(taken)), replace=False)
        return drawn[~np.isin(drawn, taken)][:count]

    def _check_needle(self, document_tokens: int) -> None:
        words = np.arange(len(self.keys.words[0]))[:, None].repeat(len(self.keys.fields), 1)
        digits = np.zeros((len(words), VALUE_DIGITS), np.int64)
        longest = max(map(len, self._tokenizer.encode_batch(self._needle_texts(words, digits))))
        if longest > self._body_len:
            raise DataError(
                f"document_tokens {document_tokens} leaves {self._body_len} tokens for text and a needle "
                f"takes up to {longest}; raise document_tokens to "
                f"{document_tokens + longest - self._body_len} or more"
            )
