"""Sources over given documents and questions: what sources of real text build on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from msa_jax.data.records import Document, Episode, Question
from msa_jax.data.splits import draw_numbers
from msa_jax.errors import DataError

# Words that say something: of a sentence that asks for its document, and of a document that lacks it.
MIN_WORDS = 5


def without(document: Document, hidden: str) -> Document:
    """The document lacking that text; unchanged where the text is not in it, or fewer than five words would be left."""
    before, found, after = document.text.partition(hidden)
    rest = f"{before.rstrip()} {after.lstrip()}".strip()
    if not found or len(rest.split()) < MIN_WORDS:
        return document
    return Document(document.id, document.title, rest)


class CorpusSource:
    """A source over given documents and the questions of one split: what sources of real text build on.

    Args:
      documents: distinct ids.
      questions: each supported by some of them; one that is given several times takes several slots.
      hidden_fraction: how often an episode takes a question's `hidden` text out of its documents.
      negatives: ids of documents by question id that are mistaken for what it asks for.
      num_negatives: how many of them an episode holds for each of its questions, as far as there is room.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        questions: Sequence[Question],
        *,
        hidden_fraction: float = 1.0,
        negatives: Mapping[str, Sequence[str]] | None = None,
        num_negatives: int = 1,
    ):
        self.documents = list(documents)
        self.questions = list(questions)
        self._hidden_fraction = hidden_fraction
        self._index = {document.id: i for i, document in enumerate(self.documents)}
        self._num_negatives = num_negatives
        self._negatives = {name: [self._index[i] for i in ids] for name, ids in (negatives or {}).items()}

    def with_(self, documents: Sequence[Document], questions: Sequence[Question], **negatives) -> CorpusSource:
        """Other documents and questions with the same `hidden_fraction`; `negatives` and their number as given."""
        return CorpusSource(documents, questions, hidden_fraction=self._hidden_fraction, **negatives)

    def __len__(self) -> int:
        return len(self.questions)

    def texts(self) -> Iterator[str]:
        """Every document's text, then every question of the split, once each."""
        yield from (document.text for document in self.documents)
        yield from dict.fromkeys(question.question for question in self.questions)

    def episode(
        self, indices: Sequence[int], num_documents: int, rng: np.random.Generator, id_digits: int = 7
    ) -> Episode:
        """See `Source.episode`. An index given twice is asked twice of the same documents."""
        questions = [self.questions[i] for i in indices]
        needed = dict.fromkeys(self._index[d] for q in questions for d in q.supporting_ids)
        if len(needed) > num_documents:
            raise DataError(
                f"{len(questions)} questions need {len(needed)} supporting documents and num_documents is "
                f"{num_documents}; raise num_documents or ask fewer questions at once"
            )
        total = len(self.documents)
        if num_documents > total:
            raise DataError(f"num_documents is {num_documents} and the source has {total} documents; lower it")
        # Among this many distinct draws there are enough that nobody needs.
        drawn = rng.choice(total, num_documents, replace=False).tolist()
        hard = [i for q in questions for i in self._mistaken(q, rng)]
        others = [i for i in dict.fromkeys([*hard, *drawn]) if i not in needed]
        chosen = [*needed, *others][:num_documents]
        order = rng.permutation(num_documents)
        numbers = draw_numbers(rng, num_documents, id_digits)
        shown = {i: self.documents[i] for i in chosen}
        for question in questions:
            if question.hidden and rng.random() < self._hidden_fraction:
                for i in (self._index[d] for d in question.supporting_ids):
                    shown[i] = without(shown[i], question.hidden)
        return Episode([shown[chosen[i]] for i in order], numbers.tolist(), questions)

    def _mistaken(self, question: Question, rng: np.random.Generator) -> list[int]:
        found = self._negatives.get(question.id)
        if not found:
            return []
        return rng.choice(found, min(self._num_negatives, len(found)), replace=False).tolist()

    def memory(
        self, num_documents: int, num_questions: int, rng: np.random.Generator, *, id_digits: int = 7
    ) -> tuple[list[Question], Iterator[tuple[list[Document], list[int]]]]:
        """See `Source.memory`: one block. Questions are as many as there are, if fewer than asked for."""
        indices = rng.permutation(len(self.questions))[:num_questions].tolist()
        episode = self.episode(indices, num_documents, rng, id_digits)
        return episode.questions, iter([(episode.documents, episode.numbers)])
