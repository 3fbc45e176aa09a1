"""Where documents and questions come from. Every module of this folder is a source, named as the module is.

Such a module has a class `Settings`, derived from `SourceSettings`, and nothing else has to know of it: its fields
become settings of a run (`data.FIELD`), and `build` makes the source of a split.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from msa_jax.data.records import Document, Episode, Question
from msa_jax.data.splits import Split
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import ConfigError

if TYPE_CHECKING:
    from msa_jax.data.batch_config import BatchConfig


class Source(Protocol):
    """Documents and questions of one split. Reading is thread-safe; all randomness comes from `rng`."""

    def __len__(self) -> int:
        """Number of question slots: what `indices` index."""

    def episode(
        self, indices: Sequence[int], num_documents: int, rng: np.random.Generator, id_digits: int = 7
    ) -> Episode:
        """Asks the questions at `indices` of `num_documents` distinct documents in random order.

        All supporting documents are there; the others are drawn by `rng`, and so are the documents' numbers,
        out of 0..10**id_digits - 1. Raises DataError when `num_documents` is too small or the source has too
        few.
        """

    def memory(
        self, num_documents: int, num_questions: int, rng: np.random.Generator, *, id_digits: int = 7
    ) -> tuple[list[Question], Iterator[tuple[list[Document], list[int]]]]:
        """An episode of any size, block by block: (questions, iterator of (documents, numbers)).

        All numbers and ids are distinct over all blocks. Raises DataError when `num_documents` is too small
        or the source has too few.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What a source needs to know beyond `BatchConfig`, validated on construction.

    The docstring says under `Attributes:` what each field is. One that several sources have is one setting of a run,
    so it has one type.
    """

    # Whether a document is the same in every batch, so that its words can be counted and mistakes for it be mined.
    lasting_documents: ClassVar[bool] = False
    # Settings that are refused with another source, not passed over.
    must_act: ClassVar[tuple[str, ...]] = ()

    @property
    def word_pattern(self) -> str | None:
        """Within what pieces of text tokens lie, where the tokenizer's own way will not do; see `Tokenizer.train`."""
        return None

    def texts(self, data: BatchConfig) -> Iterable[str]:
        """What a tokenizer is trained on, always in the same order."""
        raise NotImplementedError

    def build(self, data: BatchConfig, tokenizer: Tokenizer, split: Split) -> Source:
        """The source of a split; no document of it takes more than `data.document_len` tokens.

        Raises:
          DataError: files or text that are missing, broken or too short.
        """
        raise NotImplementedError


def names() -> list[str]:
    """All sources there are, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def settings_type(name: str) -> type[SourceSettings]:
    """The settings of a source; raises ConfigError when there is no such source."""
    if name not in names():
        raise ConfigError(f"data.source must be {', '.join(names()[:-1])} or {names()[-1]}, got {name!r}.")
    return importlib.import_module(f"{__name__}.{name}").Settings


def owners() -> dict[str, list[str]]:
    """Names of the sources that have a setting, by its name.

    Raises:
      ConfigError: two sources have one of different types.
    """
    found: dict[str, list[str]] = {}
    types: dict[str, Any] = {}
    for source in names():
        for name, kind in field_types(settings_type(source)).items():
            if types.setdefault(name, kind) != kind:
                raise ConfigError(
                    f"data.{name} is {types[name]} for {found[name][0]} and {kind} for {source}: give one another name."
                )
            found.setdefault(name, []).append(source)
    return found


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Types of a dataclass' fields by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
