"""Hard negatives as data: a file that says which documents are mistaken for what a question asks for."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from msa_jax.data.corpora.corpus import CorpusSource
from msa_jax.errors import DataError
from msa_jax.files import write_text


def write_negatives(path: str | Path, negatives: Mapping[str, Iterable[str]]) -> None:
    """One JSON object a line: `question` (an id) and `negatives` (ids of documents); the file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"question": name, "negatives": list(ids)} for name, ids in negatives.items())
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def with_negatives(source: CorpusSource, path: str | Path, num_negatives: int) -> CorpusSource:
    """The source, whose episodes hold `num_negatives` of the documents in the file for each question it knows.

    Questions of the file that the source lacks are passed over.

    Raises:
      DataError: the file is missing or broken, names documents that the source lacks, or none of its questions.
    """
    path = Path(path)
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        found = {row["question"]: list(row["negatives"]) for row in rows}
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); write it with python -m msa_jax.evaluation.mine"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds no hard negatives ({error!r}); write it with python -m msa_jax.evaluation.mine"
        ) from None
    asked = {question.id for question in source.questions}
    found = {name: ids for name, ids in found.items() if name in asked}
    if not found:
        raise DataError(f"{path} has negatives for none of the {len(asked)} questions; mine for this run's questions")
    known = {document.id for document in source.documents}
    unknown = next((i for ids in found.values() for i in ids if i not in known), None)
    if unknown is not None:
        raise DataError(
            f"{path} names the document {unknown!r}, which is not there: it was mined with documents cut otherwise; "
            "use that run's tokenizer, id_digits and document_len, or mine again"
        )
    return source.with_(source.documents, source.questions, negatives=found, num_negatives=num_negatives)
