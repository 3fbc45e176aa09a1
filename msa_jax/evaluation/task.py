"""What a task of evaluation is, and what it is given."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msa_jax import distributed
from msa_jax.data import Renderer, Source
from msa_jax.errors import ConfigError, DataError
from msa_jax.evaluation.report import Column
from msa_jax.files import write_text
from msa_jax.model import MSATransformer
from msa_jax.runs.build import make_source
from msa_jax.runs.config import RunConfig

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """Of a task that has none of its own."""


class Results:
    """Rows of scores, in a file that is written whole after each.

    Attributes:
      rows: in the order in which they came.
    """

    def __init__(self, path: pathlib.Path | None, about: Mapping[str, Any], *, resumes: bool):
        """Begin, or with `resumes` go on with what the file has.

        Args:
          about: what rows depend on, kept beside them.

        Raises:
          DataError: the file has rows about something else, or its folder is not there.
        """
        if path is not None and not path.parent.is_dir():
            raise DataError(f"--json {path}: there is no folder {path.parent}; make it, or name another file")
        self._path, self._about, self._resumes = path, json.loads(json.dumps(dict(about))), resumes
        self.rows: list[Row] = []
        if resumes and path is not None and path.exists():
            there = json.loads(path.read_text())
            self.rows = there.pop("rows")
            if there != self._about:
                raise DataError(f"{path} holds scores of another model, memory or settings; give another --json")

    def find(self, **fields: Any) -> Row | None:
        """The row that has these values, if there is one."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in fields.items())), None)

    def add(self, row: Row) -> None:
        """One more row, kept at once if the task can go on from it."""
        self.rows.append(row)
        if self._resumes:
            self.write()

    def write(self) -> None:
        if self._path is not None and distributed.is_main():
            write_text(self._path, json.dumps({"rows": self.rows} | self._about, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a task is run on.

    Attributes:
      sizes: of memory, in tokens.
      settings: the task's own.
      results: rows so far, to be added to.
      run, workdir, model, renderer: of the trained run; None where a task runs without one and none was given.
      folders: of documents and questions.
      memory: folder in which a task keeps a memory that it encodes once.
      baselines: what else is asked, by name.
    """

    sizes: Sequence[int]
    settings: Any
    results: Results
    run: RunConfig | None = None
    workdir: pathlib.Path | None = None
    model: MSATransformer | None = None
    renderer: Renderer | None = None
    folders: Sequence[pathlib.Path] = ()
    memory: pathlib.Path | None = None
    baselines: Sequence[str] = ()

    @functools.cached_property
    def source(self) -> Source:
        """The run's held-out data."""
        return make_source(self.run.data, self.renderer.tokenizer, "eval")

    def require_source(self, name: str) -> None:
        """Raises DataError unless the run was trained on data of this source."""
        if self.run.data.source != name:
            raise DataError(f'{self.workdir} is a run of data.source "{self.run.data.source}"; give one of "{name}"')


@dataclasses.dataclass(frozen=True)
class Task:
    """A way to evaluate: a file of `tasks` ends in one, named TASK.

    Attributes:
      run: adds rows to `Inputs.results`.
      columns: of the table that is printed.
      settings: a dataclass of the task's own settings, each with a default.
      baselines: that it knows.
      needs_run: whether a trained run must be given.
      distributed: whether several processes may share the work.
      resumes: whether rows that are in the file already are passed over.
      draw: a picture of the rows; None for no picture.
    """

    run: Callable[[Inputs], None]
    columns: Sequence[Column]
    settings: type = NoSettings
    baselines: Sequence[str] = ()
    needs_run: bool = True
    distributed: bool = False
    resumes: bool = False
    draw: Callable[[Sequence[Row], pathlib.Path], None] | None = None

    def settings_of(self, given: Sequence[str]) -> Any:
        """The task's settings, of NAME=VALUE each; values of several parts have commas.

        Raises:
          ConfigError: an unknown name, or a value of another type.
        """
        fields = {field.name: field.default for field in dataclasses.fields(self.settings)}
        values = {}
        for one in given:
            name, there, value = one.partition("=")
            if not there or name not in fields:
                raise ConfigError(f"--set={one} is no setting of this task; there are {', '.join(fields) or 'none'}.")
            kind = type(fields[name])
            try:
                values[name] = tuple(value.split(",")) if kind is tuple else kind(value)
            except ValueError:
                raise ConfigError(f"--set={one}: {name} must be of type {kind.__name__}.") from None
        return self.settings(**values)
