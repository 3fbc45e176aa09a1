"""Where documents and questions come from."""

from msa_jax.data.sources.base import CorpusSource, Source
from msa_jax.data.sources.keys import frequent_words
from msa_jax.data.sources.needles import NeedleSource, training_texts

__all__ = ["CorpusSource", "NeedleSource", "Source", "frequent_words", "training_texts"]
