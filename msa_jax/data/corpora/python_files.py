"""Documented objects of Python files, read by parsing: nothing is ever imported or run."""

import ast
import importlib.metadata
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa_jax.data.sources import SourceSettings
from msa_jax.errors import DataError

_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class InstalledSettings(SourceSettings):
    """A source that reads the documentation of this Python.

    Attributes:
      packages: installed distributions that are read besides the standard library; None reads all.
      include_sources: read their source code too.
      max_chars: stop reading after so many characters; None reads everything.
    """

    packages: tuple[str, ...] | None = ()
    include_sources: bool = False
    max_chars: int | None = None

    def installed(self) -> dict[str, Any]:
        """These settings as arguments of `PythonDocsSource`."""
        return dict(packages=self.packages, include_sources=self.include_sources, max_chars=self.max_chars)


@dataclass(frozen=True, slots=True)
class PythonObject:
    """A module, class or function with a docstring. `code` is a function's body behind the docstring."""

    name: str
    signature: str
    docstring: str
    code: str


def standard_library_files() -> list[tuple[str, Path]]:
    """Module names and files of the standard library, sorted; raises DataError if it has no source files."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted((_module_name(p.relative_to(folder)), p) for p in _python_files(folder))
    if not files:
        raise DataError(f"the Python installation has no source files in {folder}; use one that has them")
    return files


def package_files(packages: Sequence[str] | None) -> list[tuple[str, Path]]:
    """Module names and files of installed distributions, in the order given; None is all of them, by name.

    Raises DataError naming a distribution that is not installed.
    """
    if packages is None:
        names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
        packages = sorted(name for name in names if name)
    found: dict[str, Path] = {}
    for name in packages:
        try:
            listed = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError as error:
            raise DataError(f"the package {name!r} is not installed; install it or leave it out") from error
        for path in sorted(listed, key=str):
            inside = path.suffix == ".py" and ".." not in path.parts and not _is_test(Path(path))
            if inside and Path(path.locate()).is_file():
                found.setdefault(_module_name(Path(path)), Path(path.locate()))
    return list(found.items())


def read_objects(module: str, path: Path) -> tuple[str, list[PythonObject]]:
    """A file's text and its public documented objects in order; nothing of a file that does not parse."""
    data = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files have escapes that the parser warns of
            tree = ast.parse(data)
        source = data.decode("utf-8-sig")
    except (SyntaxError, ValueError, RecursionError):
        return "", []
    docstring = ast.get_docstring(tree)
    own = [PythonObject(module, "module", docstring, "")] if docstring else []
    return source, own + list(_walk(tree, module, re.split("\r\n|\r|\n", source)))


def read_topics() -> Iterator[tuple[str, str]]:
    """Names and texts of the language reference behind `help()`, sorted; nothing where it is absent."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes()).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict):
            yield from sorted(ast.literal_eval(value).items())


def _walk(parent: ast.Module | ast.ClassDef, prefix: str, lines: list[str]) -> Iterator[PythonObject]:
    for node in parent.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or node.name[0] == "_":
            continue
        name = f"{prefix}.{node.name}"
        if docstring := ast.get_docstring(node):
            code = "" if isinstance(node, ast.ClassDef) else _body(node, lines)
            yield PythonObject(name, _signature(node), docstring, code)
        if isinstance(node, ast.ClassDef):
            yield from _walk(node, name, lines)


def _body(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines[node.body[0].end_lineno : node.end_lineno]))


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def _python_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.name not in _SKIPPED_FOLDERS:
                yield from _python_files(path)
        elif path.suffix == ".py" and not _is_test(Path(path.name)):
            yield path


def _is_test(path: Path) -> bool:
    stem = path.stem
    named = stem.startswith("test_") or stem.endswith("_test") or stem == "conftest"
    return named or not _SKIPPED_FOLDERS.isdisjoint(path.parts[:-1])


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
