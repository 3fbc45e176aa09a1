"""Pairs for retrieval out of documents alone: a title, or a sentence, that asks for its document."""

from collections import Counter
from collections.abc import Sequence

from msa_jax.data.chunker import sentences
from msa_jax.data.corpora.corpus import MIN_WORDS
from msa_jax.data.records import Document, Question
from msa_jax.data.splits import stable_hash


def make_pairs(documents: Sequence[Document]) -> list[Question]:
    """Questions without answers, at most two a document: its title, and one of its sentences.

    The sentence is chosen by the hash of the document's id and is the question's `hidden` text, which episodes
    take out of the document. A title of two documents asks for neither, nor does a sentence that asks for two,
    that the rest of its document repeats, or that has, or leaves, fewer than five words.
    """
    questions = []
    for document in documents:
        if document.title.strip():
            questions.append(Question(f"title:{document.id}", document.title, (), (document.id,)))
        found = _sentence(document)
        if found:
            question = " ".join(found.split())
            questions.append(Question(f"sentence:{document.id}", question, (), (document.id,), hidden=found))
    asked = Counter(q.question for q in questions)
    return [q for q in questions if asked[q.question] == 1]


def _sentence(document: Document) -> str:
    """The sentence that asks for the document, or nothing."""
    parts = sentences(document.text)
    index = stable_hash(document.id) % len(parts)
    chosen = parts[index].strip()
    rest = "".join(parts[:index] + parts[index + 1 :])
    enough = min(len(chosen.split()), len(rest.split())) >= MIN_WORDS
    return chosen if enough and chosen not in rest else ""
