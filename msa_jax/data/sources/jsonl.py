"""A folder of documents.jsonl and, if there are questions, questions.jsonl."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msa_jax.data.chunker import sentences
from msa_jax.data.records import DataError, Document, Question
from msa_jax.data.sources.base import CorpusSource, Split, check_split, in_split, stable_hash

_MAX_ERRORS = 10
_MIN_WORDS = 5  # of a sentence that is to find its passage, and of the passage that is left
_DOCUMENT_FIELDS = {"id": str, "title": str, "text": str}
_QUESTION_FIELDS = {"id": str, "question": str, "answers": list, "supporting_ids": list}
_KINDS = {str: "a string", list: "a list of strings"}


class JsonlSource(CorpusSource):
    """Documents and questions of a folder, one JSON object a line, UTF-8.

    `documents.jsonl` has `id`, `title`, `text`; `questions.jsonl` has `id`, `question`, `answers`,
    `supporting_ids`. Other fields and empty lines are passed over.
    Without questions.jsonl pairs for retrieval are made, which have no answers: by the hash of a document's
    id either its title asks for it, or its first sentence does, and is then taken out of the text. What would
    ask for two documents, or leave too little, asks nothing.
    Documents are shared by both splits, questions never.

    Raises:
      DataError: naming file, line, fault and remedy of up to ten faults at once: broken JSON, a field that is
        missing or of a wrong type, an id given twice, empty text, text of more than `max_document_chars`
        characters, a supporting id without its document; or no documents, or a split without questions.
    """

    def __init__(
        self,
        folder: str | Path,
        split: Split = "train",
        eval_fraction: float = 0.1,
        *,
        max_document_chars: int = 1_000_000,
    ):
        check_split(split, eval_fraction)
        folder = Path(folder)
        faults = _Faults()
        documents = _read_documents(folder / "documents.jsonl", max_document_chars, faults)
        faults.throw()  # first of all: a broken document would break the questions that need it
        if (folder / "questions.jsonl").is_file():
            questions = _read_questions(folder / "questions.jsonl", {d.id for d in documents}, faults)
            faults.throw()
        else:
            documents, questions = _make_pairs(documents)
        own = [q for q in questions if in_split(q.question, split, eval_fraction)]
        if not own:
            raise DataError(
                f"{folder}: of {len(questions)} questions none is in the {split} split; add questions or "
                f"change eval_fraction ({eval_fraction})"
            )
        super().__init__(documents, own)


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
        raise DataError(
            f"{path} holds no documents; write one JSON object a line with {_names(_DOCUMENT_FIELDS)}"
        )
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
            faults.add(
                where, f"supporting id {unknown!r} names no document; add it to documents.jsonl or correct it"
            )
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
                faults.add(
                    where, f"broken JSON ({error.msg}, column {error.colno}); write one JSON object a line"
                )
                continue
            fault = _fault_of(row, fields)
            if fault:
                faults.add(where, fault)
                continue
            if row["id"] in seen:
                faults.add(
                    where, f"id {row['id']!r} was given in line {seen[row['id']]} already; make ids unique"
                )
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


def _make_pairs(documents: list[Document]) -> tuple[list[Document], list[Question]]:
    """Documents, of which some lack their first sentence, and the questions that ask for them."""
    titles = Counter(d.title for d in documents)
    kept, questions = [], []
    for document in documents:
        first, *others = sentences(document.text)
        sentence, rest = " ".join(first.split()), "".join(others).strip()
        by_title = bool(document.title.strip()) and titles[document.title] == 1
        enough = min(len(sentence.split()), len(rest.split())) >= _MIN_WORDS
        by_sentence = enough and first.strip() not in rest
        if by_sentence and (stable_hash(document.id) % 2 or not by_title):
            kept.append(Document(document.id, document.title, rest))
            questions.append(Question(f"sentence:{document.id}", sentence, (), (document.id,)))
            continue
        kept.append(document)
        if by_title:
            questions.append(Question(f"title:{document.id}", document.title, (), (document.id,)))
    asked = Counter(q.question for q in questions)
    return kept, [q for q in questions if asked[q.question] == 1]
