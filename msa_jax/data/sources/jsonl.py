"""Folders of documents.jsonl and, if there are questions, questions.jsonl."""

from collections.abc import Sequence
from pathlib import Path

from msa_jax.data.records import Document, Question
from msa_jax.data.sources.base import CorpusSource, Split, check_split, in_split
from msa_jax.data.sources.jsonl_rows import Faults, read_documents, read_questions
from msa_jax.data.sources.pairs import make_pairs
from msa_jax.errors import DataError


class JsonlSource(CorpusSource):
    """Documents and questions of one folder or of several, one JSON object a line, UTF-8.

    `documents.jsonl` has `id`, `title`, `text`; `questions.jsonl`, which a folder may lack, has `id`, `question`,
    `answers`, `supporting_ids`. Other fields and empty lines are passed over. Folders are one corpus: a document
    that several hold is there once, and questions may be supported by documents of other folders.
    Without any question, or on demand, documents ask for themselves (`make_pairs`): for retrieval, no answers.
    Documents are shared by both splits, questions never. Pairs beside questions are of the training split alone.

    Args:
      folders: one or several; documents and questions keep their order.
      split, eval_fraction: which part of the questions, decided by the hash of the question's text.
      pair_fraction: share of pairs among what is asked, where there are questions; questions (or pairs) then take
        several slots each, so that batches drawn from all slots have that share on average.
      hidden_fraction: see `CorpusSource`.
      max_document_chars: a longer document is a fault.

    Raises:
      DataError: naming file, line, fault and remedy of up to ten faults at once: broken JSON, a field that is
        missing or of a wrong type, an id given twice in a file, for two different documents, or for two questions,
        empty text, text of more than `max_document_chars` characters, a supporting id without its document; or no
        documents, or a split without questions.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path],
        split: Split = "train",
        eval_fraction: float = 0.1,
        *,
        pair_fraction: float = 0.0,
        hidden_fraction: float = 1.0,
        max_document_chars: int = 1_000_000,
    ):
        check_split(split, eval_fraction)
        if not 0 <= pair_fraction < 1:
            raise DataError(f"pair_fraction must be at least 0 and below 1, got {pair_fraction}")
        folders = [Path(f) for f in ([folders] if isinstance(folders, str | Path) else folders)]
        if not folders:
            raise DataError("no folder was given; name one that holds documents.jsonl")
        documents = _merged_documents(folders, max_document_chars)
        questions = _merged_questions(folders, documents)
        pairs = make_pairs(documents) if pair_fraction or questions is None else []
        asked = pairs if questions is None else questions
        own = [q for q in asked if in_split(q.question, split, eval_fraction)]
        if not own:
            raise DataError(
                f"{', '.join(map(str, folders))}: of {len(asked)} questions none is in the {split} split; add "
                f"questions or change eval_fraction ({eval_fraction})"
            )
        if pairs and pairs is not asked and split == "train":
            own = _shared(own, pairs, pair_fraction)
        super().__init__(documents, own, hidden_fraction=hidden_fraction)


def _merged_documents(folders: Sequence[Path], max_chars: int) -> list[Document]:
    faults = Faults()
    merged: dict[str, Document] = {}
    for folder in folders:
        path = folder / "documents.jsonl"
        for document in read_documents(path, max_chars, faults):
            known = merged.setdefault(document.id, document)
            if known != document:
                faults.add(
                    str(path),
                    f"document {document.id!r} has another title or text in a folder before this one; give different "
                    "documents different ids",
                )
        faults.throw()  # before any question: a broken document would break the questions that need it
    return list(merged.values())


def _merged_questions(folders: Sequence[Path], documents: Sequence[Document]) -> list[Question] | None:
    """None where no folder has questions.jsonl."""
    faults, ids = Faults(), {document.id for document in documents}
    merged: dict[str, Question] = {}
    paths = [folder / "questions.jsonl" for folder in folders if (folder / "questions.jsonl").is_file()]
    for path in paths:
        for question in read_questions(path, ids, faults):
            if question.id in merged:
                faults.add(str(path), f"question {question.id!r} is in a folder before this one too; make ids unique")
            merged[question.id] = question
    faults.throw()
    return list(merged.values()) if paths else None


def _shared(questions: list[Question], pairs: list[Question], pair_fraction: float) -> list[Question]:
    """Slots for both, of which pairs have about the share wanted: the rarer kind is repeated."""
    ratio = len(pairs) * (1 - pair_fraction) / (len(questions) * pair_fraction)
    return pairs * max(1, round(1 / ratio)) + questions * max(1, round(ratio))
