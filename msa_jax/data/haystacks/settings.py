"""Settings that all sources of needles share: the text that needles are put in, and how hard they are to tell apart."""

from __future__ import annotations

import dataclasses

from msa_jax.data.corpora.jsonl_rows import folders_of, merged_documents
from msa_jax.data.corpora.python_files import InstalledSettings
from msa_jax.data.sources.python_docs import PythonDocsSource
from msa_jax.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class HaystackSettings(InstalledSettings):
    """A source of needles in text.

    Attributes:
      folder: of a documents.jsonl with the text; several are parted by commas. Empty takes Python's documentation.
      hard_fraction: share of keys that share their words with many others.
      needle_fraction: share of the documents not asked for that carry needles too.
    """

    folder: str = ""
    hard_fraction: float = 0.75
    needle_fraction: float = 1.0

    def __post_init__(self):
        for name in ("hard_fraction", "needle_fraction"):
            require(0 <= getattr(self, name) <= 1, f"data.{name} must be in 0..1, got {getattr(self, name)}.")

    def haystack(self) -> list[str]:
        """The texts that needles are put in; raises DataError for a folder that is missing or broken."""
        if self.folder:
            return [document.text for document in merged_documents(folders_of(self.folder))]
        return list(PythonDocsSource("train", **self.installed()).passages())
