"""What data is made of: documents, questions, and the episodes that batches are built from."""

from dataclasses import dataclass, field

import numpy as np

from msa_jax.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is encoded alone.

    `id` is its identity (two documents may share a text, never an id). `tokens`, where given, is
    `tokenizer.encode(" " + text)`, made ahead of time by sources that build documents out of tokens.
    """

    id: str
    title: str
    text: str
    tokens: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the answers that count as right (the first is trained on), and the documents to find.

    No answers means retrieval only: the reply then ends where retrieval ends. `wanted` are the values that an answer
    must all name, where it asks for several; see `msa_jax.evaluation.scores.string_match`.
    `hidden` is text of its document that gives it away, such as the very sentence that asks: episodes leave it out.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    supporting_ids: tuple[str, ...]
    wanted: tuple[str, ...] = ()
    hidden: str = ""


@dataclass(frozen=True, slots=True)
class Episode:
    """A set of documents and questions about them: one training batch before tokens.

    `numbers[i]` is the number by which the model names `documents[i]`, such as 4 in `[4]`. `visible`, bool
    `[questions, documents]`, says which documents each question may see; None is all. No question may see two
    documents of one number.
    Raises DataError when ids repeat, or numbers that a question sees, or a question is supported by a document that
    is not here or that it may not see.
    """

    documents: list[Document]
    numbers: list[int]
    questions: list[Question]
    visible: np.ndarray | None = field(default=None, compare=False)

    def __post_init__(self):
        if len(self.numbers) != len(self.documents):
            raise DataError(
                f"an episode needs one number a document: {len(self.documents)} documents, {len(self.numbers)} numbers"
            )
        if self.visible is None and len(set(self.numbers)) != len(self.numbers):
            raise DataError("document numbers of an episode must differ; draw them without replacement")
        ids = self.index_of()
        if len(ids) != len(self.documents):
            raise DataError("document ids of an episode must differ; a document can be given once only")
        for question in self.questions:
            missing = [i for i in question.supporting_ids if i not in ids]
            if missing:
                raise DataError(
                    f"question {question.id!r} is supported by {missing[0]!r}, which is not among the "
                    f"episode's {len(ids)} documents; add that document"
                )
        if self.visible is not None:
            self._check_visible(ids)

    def _check_visible(self, places: dict[str, int]) -> None:
        shape = (len(self.questions), len(self.documents))
        if self.visible.shape != shape:
            raise DataError(f"visible must be [questions, documents] {shape}, got {self.visible.shape}")
        numbers = np.asarray(self.numbers)
        for question, seen in zip(self.questions, self.visible, strict=True):
            own, counts = np.unique(numbers[seen], return_counts=True)
            if counts.max(initial=1) > 1:
                raise DataError(
                    f"question {question.id!r} sees {counts.max()} documents of the number {own[counts.argmax()]}; "
                    "numbers must differ among documents that are seen together"
                )
            hidden = [i for i in question.supporting_ids if not seen[places[i]]]
            if hidden:
                raise DataError(
                    f"question {question.id!r} is supported by {hidden[0]!r}, which it may not see; let it see that"
                )

    def index_of(self) -> dict[str, int]:
        """Document id -> its place in `documents`."""
        return {document.id: i for i, document in enumerate(self.documents)}
