"""Settings that all sources of real text share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from msa_jax.data.corpora.corpus import CorpusSource
from msa_jax.data.corpora.cutting import cut_documents, fitting_questions
from msa_jax.data.corpora.negatives import with_negatives
from msa_jax.data.samples import Renderer
from msa_jax.data.sources import SourceSettings
from msa_jax.data.splits import Split
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import require

if TYPE_CHECKING:
    from msa_jax.data.batch_config import BatchConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusSettings(SourceSettings):
    """A source whose documents are given: long ones are cut, and questions that do not fit are left out of training.

    Attributes:
      titles: every text begins with its title.
      hard_negatives: file of documents mistaken for what questions ask for (`python -m msa_jax.evaluation.mine`).
      num_negatives: of these in a batch, for each question that the file knows.
    """

    lasting_documents: ClassVar[bool] = True
    must_act: ClassVar[tuple[str, ...]] = ("hard_negatives",)
    titles: bool = False
    hard_negatives: str = ""
    num_negatives: int = 1

    def __post_init__(self):
        require(self.num_negatives >= 1, f"data.num_negatives must be at least 1, got {self.num_negatives}.")

    def read(self, split: Split, eval_fraction: float) -> CorpusSource:
        """All documents, uncut, and the questions of a split."""
        raise NotImplementedError

    def texts(self, data: BatchConfig) -> Iterable[str]:
        return self.read("train", data.eval_fraction).texts()

    def build(self, data: BatchConfig, tokenizer: Tokenizer, split: Split) -> CorpusSource:
        renderer = Renderer(tokenizer, data.document_len)
        corpus = self.read(split, data.eval_fraction)
        corpus = cut_documents(corpus, tokenizer, renderer.body_len, titles=self.titles)
        if split == "eval":
            return corpus
        corpus = fitting_questions(
            corpus, renderer, data.question_len, samples=data.samples, unanswerable=data.unanswerable > 0
        )
        return with_negatives(corpus, self.hard_negatives, self.num_negatives) if self.hard_negatives else corpus
