"""Tasks of evaluation, one file each. The first line of a file's docstring is what `eval.py --help` says of it."""

from __future__ import annotations

import ast
import importlib
import pathlib

from msa_jax.errors import ConfigError
from msa_jax.evaluation.task import Task


def described() -> dict[str, str]:
    """Tasks by name, each with a line that says what it is; nothing of them is imported."""
    files = sorted(file for folder in __path__ for file in pathlib.Path(folder).glob("[a-z]*.py"))
    return {file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0] for file in files}


def find(name: str) -> Task:
    """The task of a name; raises ConfigError when there is none."""
    if name not in described():
        raise ConfigError(f"--task={name}: there is no such task, there are {', '.join(described())}.")
    return importlib.import_module(f"{__name__}.{name}").TASK
