"""Documents from JSON lines."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator

from msa_jax.bank.table import BankDocument
from msa_jax.errors import BankError


def read_documents(path: str) -> Iterator[BankDocument]:
    """Documents of a file of JSON lines, or of standard input for "-", streamed.

    Raises:
      BankError: no such file, or a line that is no document; it is named.
    """
    if path != "-":
        _open(path).close()  # what cannot be read is told now, not in a thread later

    def documents():
        with _open(path) as file:
            number = 0
            try:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _document(line, f"{path}, line {number}")
            except UnicodeDecodeError as e:
                raise BankError(f"{path}: not UTF-8 after line {number} ({e.reason}).") from e

    return documents()


def count_lines(path: str) -> int | None:
    """How many lines a file has; None for standard input."""
    if path == "-":
        return None
    count, last = 0, b"\n"
    with _open(path, "rb") as file:
        while block := file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _open(path: str, mode: str = "r"):
    try:
        return sys.stdin if path == "-" else open(path, mode, encoding=None if "b" in mode else "utf-8")
    except OSError as e:
        raise BankError(f"{path}: {e.strerror}.") from e


def _document(line: str, where: str) -> BankDocument:
    try:
        values = json.loads(line)
    except ValueError as e:
        raise BankError(f"{where}: not valid JSON ({e}).") from e
    names = {field.name for field in dataclasses.fields(BankDocument)}
    if not isinstance(values, dict) or not {"id", "text"} <= values.keys() <= names:
        raise BankError(f"{where}: needs an object with id and text, and of these at most: {', '.join(sorted(names))}.")
    if not all(isinstance(values.get(name, ""), str) for name in names - {"metadata"}) or not values["id"]:
        raise BankError(f"{where}: id, text, title and namespace must be strings, and id not empty.")
    if not isinstance(values.get("metadata", {}), dict):
        raise BankError(f"{where}: metadata must be an object.")
    return BankDocument(**values)
