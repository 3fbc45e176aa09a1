"""The shape of a run's batches and what a sample is: all that a source needs to know of them."""

from __future__ import annotations

import dataclasses
from typing import get_args

from msa_jax.data.episodes import SampleForm
from msa_jax.data.samples import LossWeights
from msa_jax.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The shape of a batch, and what a sample is.

    Attributes:
      document_len: tokens of a rendered document at most; longer texts are cut.
      row_len: W of packed rows; None for the documents' length, rounded up to whole chunks.
      num_documents: N of a training batch.
      num_questions: B of a training batch.
      question_len: T, tokens of a question with its whole reply.
      eval_fraction: share of questions and passages held out.
      loss_weights: of the tokens of a reply.
      samples: what one sample of a question is, see `render_episode`. "chain": its whole reply, with the one routing of
        the question. "at_once": one that names all documents before it reads them. "steps": one step of the chain at a
        time, as Memory Interleave asks it. "question": no reply, the router alone learns. "latent": one that reads no
        text and answers from pooled memory.
      unanswerable: share of samples whose supporting documents are hidden from them, and which learn to say so.
      label_fraction: share of samples whose relevant documents the auxiliary loss, and logged recall, know of.
    """

    document_len: int = 64
    row_len: int | None = None
    num_documents: int = 64
    num_questions: int = 48
    question_len: int = 128
    eval_fraction: float = 0.1
    loss_weights: LossWeights = LossWeights()
    samples: SampleForm = "chain"
    unanswerable: float = 0.0
    label_fraction: float = 1.0

    def __post_init__(self):
        forms = get_args(SampleForm)
        require(self.samples in forms, f"data.samples must be one of {forms}, got {self.samples!r}.")
        require(0 <= self.unanswerable < 1, f"data.unanswerable must be a share in [0, 1), got {self.unanswerable}.")
        require(
            self.samples != "question" or not self.unanswerable,
            'data.samples "question" has no replies that could refuse: set data.unanswerable to 0.',
        )
        require(0 <= self.label_fraction <= 1, f"data.label_fraction must be in 0..1, got {self.label_fraction}.")
        for name in ("document_len", "num_documents", "num_questions", "question_len"):
            require(getattr(self, name) >= 1, f"data.{name} must be at least 1, got {getattr(self, name)}.")
