"""Reads documents.jsonl and questions.jsonl, and names up to ten faults at once with file, line and remedy."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msa_jax.data.records import Document, Question
from msa_jax.errors import DataError

_MAX_ERRORS = 10
_DOCUMENT_FIELDS = {"id": str, "title": str, "text": str}
_QUESTION_FIELDS = {"id": str, "question": str, "answers": list, "supporting_ids": list}
_KINDS = {str: "a string", list: "a list of strings"}


class _Faults:
    """Collects faults, so that a user mends ten at once."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}")
        if len(self.found) == _MAX_ERRORS:
            self.found.append(f"(stopped at {_MAX_ERRORS} faults)")
            self.throw()

    def throw(self) -> None:
        if self.found:
            raise DataError("\n".join(self.found))


def folders_of(names: str) -> list[Path]:
    """The folders of a setting that parts them by commas."""
    return [Path(name.strip()) for name in names.split(",") if name.strip()]


def merged_documents(folders: Sequence[Path], max_chars: int = 1_000_000) -> list[Document]:
    """Documents of all folders; one that several hold is there once. Raises DataError naming up to ten faults."""
    faults = _Faults()
    merged: dict[str, Document] = {}
    for folder in folders:
        path = folder / "documents.jsonl"
        for document in _read_documents(path, max_chars, faults):
            known = merged.setdefault(document.id, document)
            if known != document:
                faults.add(
                    str(path),
                    f"document {document.id!r} has another title or text in a folder before this one; give different "
                    "documents different ids",
                )
        faults.throw()  # before any question: a broken document would break the questions that need it
    return list(merged.values())


def merged_questions(folders: Sequence[Path], documents: Sequence[Document]) -> list[Question] | None:
    """Questions of all folders, or None where none has a questions.jsonl. Raises DataError as `merged_documents`."""
    faults, ids = _Faults(), {document.id for document in documents}
    merged: dict[str, Question] = {}
    paths = [folder / "questions.jsonl" for folder in folders if (folder / "questions.jsonl").is_file()]
    for path in paths:
        for question in _read_questions(path, ids, faults):
            if question.id in merged:
                faults.add(str(path), f"question {question.id!r} is in a folder before this one too; make ids unique")
            merged[question.id] = question
    faults.throw()
    return list(merged.values()) if paths else None


def _read_documents(path: Path, max_chars: int, faults: _Faults) -> list[Document]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a folder that holds documents.jsonl")
    documents = []
    for where, row in _rows(path, _DOCUMENT_FIELDS, faults):
        if not row["text"].strip():
            faults.add(where, f"document {row['id']!r} has no text; give it some or remove the line")
        elif len(row["text"]) > max_chars:
            faults.add(
                where,
                f"document {row['id']!r} has {len(row['text'])} characters, over the limit of {max_chars}; "
                "split it (msa_jax.data.split_text) or raise max_document_chars",
            )
        documents.append(Document(row["id"], row["title"], row["text"]))
    if not documents:
        faults.throw()
        raise DataError(f"{path} holds no documents; write one JSON object a line with {_names(_DOCUMENT_FIELDS)}")
    return documents


def _read_questions(path: Path, documents: set[str], faults: _Faults) -> list[Question]:
    questions = []
    for where, row in _rows(path, _QUESTION_FIELDS, faults):
        supporting = row["supporting_ids"]
        if not row["question"].strip():
            faults.add(where, f"question {row['id']!r} is empty; write it out or remove the line")
        if not supporting or len(set(supporting)) != len(supporting):
            faults.add(where, f"supporting_ids of {row['id']!r} must name at least one document, each once")
        for unknown in [d for d in supporting if d not in documents]:
            faults.add(where, f"supporting id {unknown!r} names no document; add it to documents.jsonl or correct it")
        questions.append(Question(row["id"], row["question"], tuple(row["answers"]), tuple(supporting)))
    return questions


def _rows(path: Path, fields: dict[str, type], faults: _Faults) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows whose fields are all there and of the right type, with where they stand; ids are unique."""
    seen: dict[str, int] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig").rstrip())
            except UnicodeDecodeError as error:
                faults.add(where, f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
                continue
            except json.JSONDecodeError as error:
                faults.add(where, f"broken JSON ({error.msg}, column {error.colno}); write one JSON object a line")
                continue
            fault = _fault_of(row, fields)
            if fault:
                faults.add(where, fault)
                continue
            if row["id"] in seen:
                faults.add(where, f"id {row['id']!r} was given in line {seen[row['id']]} already; make ids unique")
                continue
            seen[row["id"]] = number
            yield where, row


def _fault_of(row: object, fields: dict[str, type]) -> str | None:
    if not isinstance(row, dict):
        return f"must be a JSON object with {_names(fields)}, got {type(row).__name__}"
    for name, kind in fields.items():
        if name not in row:
            return f"field {name!r} is missing; give {_names(fields)}"
        value = row[name]
        strings = kind is list and isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not strings and not (kind is str and isinstance(value, str)):
            return f"field {name!r} must be {_KINDS[kind]}, got {json.dumps(value)[:40]}"
    return None


def _names(fields: dict[str, type]) -> str:
    return ", ".join(fields)
