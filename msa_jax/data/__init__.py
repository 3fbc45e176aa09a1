"""Sources -> documents and questions -> tokens -> packed batches. Knows no model."""

from msa_jax.data.batch import Batch, DocumentBatch, QuestionBatch, pack_documents, pack_questions
from msa_jax.data.chunker import split_text
from msa_jax.data.pipeline import make_dataset
from msa_jax.data.records import Document, Episode, Question
from msa_jax.data.samples import LossWeights, Renderer
from msa_jax.data.sources import (
    BabiSource,
    CorpusSource,
    JsonlSource,
    NeedleSource,
    PythonDocsSource,
    RulerSource,
    Source,
    cut_documents,
    fitting_questions,
    frequent_words,
    ruler_texts,
    training_texts,
)
from msa_jax.data.templates import Template
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError

__all__ = [
    "BabiSource",
    "Batch",
    "CorpusSource",
    "DataError",
    "Document",
    "DocumentBatch",
    "Episode",
    "JsonlSource",
    "LossWeights",
    "NeedleSource",
    "PythonDocsSource",
    "Question",
    "QuestionBatch",
    "Renderer",
    "RulerSource",
    "Source",
    "Template",
    "Tokenizer",
    "cut_documents",
    "fitting_questions",
    "frequent_words",
    "make_dataset",
    "pack_documents",
    "pack_questions",
    "ruler_texts",
    "split_text",
    "training_texts",
]
