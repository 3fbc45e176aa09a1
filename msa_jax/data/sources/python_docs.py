"""The documentation of the Python installation at hand: real text that every machine has."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from msa_jax.data.chunker import sentences
from msa_jax.data.corpora.corpus import CorpusSource
from msa_jax.data.corpora.python_files import (
    InstalledSettings,
    PythonObject,
    package_files,
    read_objects,
    read_topics,
    standard_library_files,
)
from msa_jax.data.corpora.settings import CorpusSettings
from msa_jax.data.records import Document, Question
from msa_jax.data.splits import Split, check_split, in_split
from msa_jax.errors import DataError

_MIN_QUESTION_WORDS = 5
_MIN_REST_CHARS = 80
_MAX_CHARS = 2000  # of a document, which is cut there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(CorpusSettings, InstalledSettings):
    """Docstrings of this Python: their first sentences ask for the rest."""

    def read(self, split: Split, eval_fraction: float) -> PythonDocsSource:
        return PythonDocsSource(split, eval_fraction=eval_fraction, **self.installed())


class PythonDocsSource(CorpusSource):
    """Docstrings of the standard library and of `packages`, as questions and documents.

    A question is the first sentence of a docstring. Its document is the object's qualified name, its
    signature and the rest of the docstring (with `include_sources`, a function's code too); its answer is the
    qualified name. Objects with too little left, and the topics of `help()`, are documents without a
    question; a sentence that opens several docstrings asks nothing. Files are parsed, never imported, and the
    same installation gives the same source.

    Args:
      packages: names of installed distributions to read besides the standard library; None reads all.
      max_chars: stops reading once the documents have this many characters together; None reads everything.
    Raises:
      DataError: when a package is not installed, or the split gets no question.
    """

    def __init__(
        self,
        split: Split = "train",
        *,
        packages: Sequence[str] | None = (),
        include_sources: bool = False,
        max_chars: int | None = None,
        eval_fraction: float = 0.1,
    ):
        check_split(split, eval_fraction)
        self._include_sources = include_sources
        self._passages = [text for _, text in read_topics()]
        documents = {f"help:{name}": Document(f"help:{name}", name, text[:_MAX_CHARS]) for name, text in read_topics()}
        questions: list[Question] = []
        room = float("inf") if max_chars is None else max_chars - sum(map(len, self._passages))
        for module, path in chain(standard_library_files(), package_files(packages)):
            if room <= 0:
                break
            source, objects = read_objects(module, path)
            new = [item for item in objects if item.name not in documents]
            for item in new:
                document, question = self._pair(item)
                documents.setdefault(item.name, document)  # a name may be defined twice, say for two platforms
                questions += [question] if question and documents[item.name] is document else []
            passages = [source] if include_sources else [item.docstring for item in new]
            self._passages += passages
            room -= sum(map(len, passages))
        asked = Counter(q.question for q in questions)
        own = [q for q in questions if asked[q.question] == 1 and in_split(q.question, split, eval_fraction)]
        if not own:
            raise DataError(
                f"{len(documents)} documents of this Python give the {split} split no question; raise max_chars"
            )
        super().__init__(list(documents.values()), own)

    def passages(self) -> Iterator[str]:
        """Plain text for haystacks: topics of `help()`, then docstrings, or files with `include_sources`."""
        yield from self._passages

    def texts(self) -> Iterator[str]:
        """All passages: they hold every question too."""
        return self.passages()

    def _pair(self, item: PythonObject) -> tuple[Document, Question | None]:
        first, *others = sentences(item.docstring)
        question = " ".join(first.split())
        rest = "".join(others).strip()
        if self._include_sources:
            rest = f"{rest}\n{item.code}".strip()
        head = f"{item.name}\n{item.signature}\n"
        body = (head + rest)[:_MAX_CHARS]
        asks = len(rest) >= _MIN_REST_CHARS and len(question.split()) >= _MIN_QUESTION_WORDS
        if not asks or question in " ".join(body.split()):
            whole = (head + item.docstring)[:_MAX_CHARS]
            return Document(item.name, item.name, whole), None
        return Document(item.name, item.name, body), Question(item.name, question, (item.name,), (item.name,))
