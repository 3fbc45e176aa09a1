"""Retrieval without a model, to compare a router with: BM25, and the cosine of bags of words."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np

from msa_jax.data import Tokenizer
from msa_jax.errors import ConfigError
from msa_jax.importing import require_extra
from msa_jax.training.bag_of_words import rarity

_QUESTIONS_AT_ONCE = 256


def rank(
    name: str, texts: Sequence[str], questions: Sequence[str], *, count: int, tokenizer: Tokenizer | None, keys: bool
) -> list[list[int]]:
    """For each question the places of its `count` best texts, or of all where there are fewer, best first.

    Args:
      name: of `RANKERS`.
      tokenizer: of the model; BM25 needs none.
      keys: questions ask for keys in one frame, which tells none from another: words that all questions have are left
        out of them, and there are no other stop words, as keys may be made of them.

    Raises:
      ConfigError: a package is not installed, or there is no tokenizer.
    """
    try:
        require_extra("baselines")
    except ImportError as error:
        raise ConfigError(str(error)) from None
    return RANKERS[name](texts, questions, min(count, len(texts)), tokenizer, keys)


def _bm25(texts, questions, count, tokenizer, keys):
    """BM25 as bm25s has it: Lucene's formula, k1 1.5, b 0.75, English stop words, no stemming."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index that it builds
    split = functools.partial(
        bm25s.tokenize, stopwords=None if keys else "en", return_ids=False, show_progress=False
    )  # fmt: skip
    asked = split(list(questions))
    frame = set.intersection(*map(set, asked)) if keys and len(asked) > 1 else set()
    index = bm25s.BM25()
    index.index(split(list(texts)), show_progress=False)
    asked = [[word for word in words if word not in frame] for words in asked]
    return index.retrieve(asked, k=count, show_progress=False).documents.tolist()


def _bag_of_words(texts, questions, count, tokenizer, keys):
    """The cosine of the sums of tokens, each weighted by its rarity among the texts."""
    if tokenizer is None:
        raise ConfigError("--baselines=bag_of_words counts the tokens of a run's tokenizer: give --workdir.")
    import scipy.sparse as sp

    weights = rarity(tokenizer, texts, tokenizer.vocab_size)
    if keys and len(questions) > 1:
        asked = tokenizer.encode_batch([" " + question for question in questions])
        weights[list(set.intersection(*map(set, asked)))] = 0.0

    def bags(rows: Sequence[str]) -> sp.csr_matrix:
        encoded = tokenizer.encode_batch([" " + row for row in rows])
        owners = np.repeat(np.arange(len(rows)), [len(one) for one in encoded])
        tokens = np.concatenate([np.asarray(one, np.int64) for one in encoded])
        bag = sp.csr_matrix((weights[tokens], (owners, tokens)), (len(rows), len(weights)))
        norms = np.sqrt(np.asarray(bag.multiply(bag).sum(1))).ravel()
        return sp.diags(1 / np.where(norms > 0, norms, 1)) @ bag

    documents, found = bags(texts).T.tocsr(), []
    for first in range(0, len(questions), _QUESTIONS_AT_ONCE):
        scores = (bags(questions[first : first + _QUESTIONS_AT_ONCE]) @ documents).toarray()
        found += np.argsort(-scores, axis=1, kind="stable")[:, :count].tolist()
    return found


RANKERS: dict[str, Callable[..., list[list[int]]]] = {"bm25": _bm25, "bag_of_words": _bag_of_words}
