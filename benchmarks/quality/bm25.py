"""BM25 as bm25s has it: k1 1.5, b 0.75, Lucene's formula."""

import logging

import bm25s
from bm25s.tokenization import Tokenized

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index that it builds

Words = list[list[str]] | Tokenized


def rank(documents: Words, questions: Words, count: int) -> list[list[int]]:
    """For each question the places of the `count` best documents, or of all where there are fewer, best first."""
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    most = min(count, len(documents.ids if isinstance(documents, Tokenized) else documents))
    return index.retrieve(questions, k=most, show_progress=False).documents.tolist()
