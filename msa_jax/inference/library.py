"""What is asked: a bank, and the original text of the documents in it, by the number that the model names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from msa_jax.data.records import Document
from msa_jax.errors import QuestionError
from msa_jax.inference.rows import Visibility
from msa_jax.memory import MemoryBank

DEFAULT_NAMESPACE = "default"


@dataclasses.dataclass(frozen=True)
class View:
    """What one question may see: namespaces `allowed` [A] bool, and what had come when it began.

    That is told by `seen`, as in `Visibility`, and by how many rows the table of the bank on disk had.
    """

    allowed: np.ndarray
    seen: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Original:
    """A document as it is read: its text, or tokens made of it ahead of time."""

    document: Document
    namespace: str = DEFAULT_NAMESPACE


class Library(Protocol):
    """What an engine asks.

    Attributes:
      bank: None for no memory.
      visibility: whose the documents of the bank are; None without a bank.
      names: of the namespaces.
      len: documents that can be read.
    """

    bank: MemoryBank | None
    visibility: Visibility | None
    names: tuple[str, ...]

    def __len__(self) -> int: ...

    def view(self, namespaces: Sequence[str] | None) -> View:
        """What a question of these namespaces may see, None all, from now on. Raises QuestionError."""

    def find(self, number: int, view: View) -> Original | None:
        """The document of a number, if there is one that the question may see."""

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Numbers of the documents at `places` of the bank, int64, -1 where there is none."""


class FixedLibrary:
    """A bank in memory and its documents, all of one namespace."""

    names = (DEFAULT_NAMESPACE,)

    def __init__(self, bank: MemoryBank | None, documents: Mapping[int, Document]):
        """Make one.

        Args:
          bank: the n-th document of it is the n-th of `documents`.
          documents: by number.

        Raises:
          ValueError: more documents than the bank has, or fewer.
        """
        places = np.full(bank.num_documents if bank else len(documents), -1, np.int64)
        there = np.flatnonzero(np.asarray(bank.layout.lengths)) if bank else np.arange(len(places))
        if len(there) != len(documents):
            raise ValueError(
                f"Session: the bank has {len(there)} documents and `documents` {len(documents)}: give each document's "
                "number and text, in the order in which they were encoded."
            )
        places[there] = list(documents)
        self.bank, self._documents, self._numbers = bank, documents, places
        self.visibility = None
        if bank is not None:
            nobody = (places < 0).astype(np.int32)
            self.visibility = Visibility(namespaces=jnp.asarray(nobody), born=jnp.zeros(len(places), jnp.int32))

    def __len__(self) -> int:
        return len(self._documents)

    def view(self, namespaces: Sequence[str] | None) -> View:
        unknown = sorted(set(namespaces or ()) - {DEFAULT_NAMESPACE})
        if unknown:
            raise QuestionError(f"no namespace {unknown[0]!r} in this bank: it has {DEFAULT_NAMESPACE}.")
        return View(np.array([namespaces is None or len(namespaces) > 0]))

    def find(self, number: int, view: View) -> Original | None:
        document = self._documents.get(number) if view.allowed[0] else None
        return document and Original(document)

    def numbers(self, places: np.ndarray) -> np.ndarray:
        return self._numbers[places]
