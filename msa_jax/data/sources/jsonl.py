"""Folders of documents.jsonl and, if there are questions, questions.jsonl."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from msa_jax.data.corpora.corpus import CorpusSource
from msa_jax.data.corpora.jsonl_rows import folders_of, merged_documents, merged_questions
from msa_jax.data.corpora.pairs import make_pairs
from msa_jax.data.corpora.settings import CorpusSettings
from msa_jax.data.records import Question
from msa_jax.data.splits import Split, check_split, in_split
from msa_jax.errors import DataError, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(CorpusSettings):
    """One's own documents, and questions if there are any.

    Attributes:
      folder: of documents.jsonl and questions.jsonl; several, parted by commas, are one corpus.
      pair_fraction: share of a batch's questions that are titles and sentences asking for their document.
      hidden_fraction: how often such a sentence is taken out of the document that it asks for.
    """

    folder: str = ""
    pair_fraction: float = 0.0
    hidden_fraction: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(self.folders != [], 'data.source "jsonl" needs data.folder, a folder with a documents.jsonl.')
        require(
            0 <= self.pair_fraction < 1 and 0 <= self.hidden_fraction <= 1,
            "data.pair_fraction must lie in [0, 1) and data.hidden_fraction in [0, 1], got "
            f"{self.pair_fraction} and {self.hidden_fraction}.",
        )

    @property
    def folders(self) -> list[Path]:
        return folders_of(self.folder)

    def read(self, split: Split, eval_fraction: float) -> JsonlSource:
        fractions = dict(pair_fraction=self.pair_fraction, hidden_fraction=self.hidden_fraction)
        return JsonlSource(self.folders, split, eval_fraction, **fractions)


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
        documents = merged_documents(folders, max_document_chars)
        questions = merged_questions(folders, documents)
        pairs = make_pairs(documents) if pair_fraction or questions is None else []
        asked = pairs if questions is None else questions
        if questions is not None and not questions:
            raise DataError(f"{', '.join(map(str, folders))}: questions.jsonl has no question; add some, or remove it")
        own = [q for q in asked if in_split(q.question, split, eval_fraction)]
        if not own:
            raise DataError(
                f"{', '.join(map(str, folders))}: of {len(asked)} questions none is in the {split} split; add "
                f"questions or change eval_fraction ({eval_fraction})"
            )
        if pairs and pairs is not asked and split == "train":
            own = _shared(own, pairs, pair_fraction)
        super().__init__(documents, own, hidden_fraction=hidden_fraction)


def _shared(questions: list[Question], pairs: list[Question], pair_fraction: float) -> list[Question]:
    """Slots for both, of which pairs have about the share wanted: the rarer kind is repeated."""
    ratio = len(pairs) * (1 - pair_fraction) / (len(questions) * pair_fraction)
    return pairs * max(1, round(1 / ratio)) + questions * max(1, round(ratio))
