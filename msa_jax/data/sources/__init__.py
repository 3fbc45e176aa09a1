"""Where documents and questions come from."""

from msa_jax.data.sources.babi import BabiSource
from msa_jax.data.sources.base import CorpusSource, Source
from msa_jax.data.sources.cutting import cut_documents, fitting_questions
from msa_jax.data.sources.jsonl import JsonlSource
from msa_jax.data.sources.keys import frequent_words
from msa_jax.data.sources.needles import NeedleSource, training_texts
from msa_jax.data.sources.pydocs import PythonDocsSource
from msa_jax.data.sources.ruler import RulerSource
from msa_jax.data.sources.ruler_tasks import ruler_texts

__all__ = [
    "BabiSource",
    "CorpusSource",
    "JsonlSource",
    "NeedleSource",
    "PythonDocsSource",
    "RulerSource",
    "Source",
    "cut_documents",
    "fitting_questions",
    "frequent_words",
    "ruler_texts",
    "training_texts",
]
