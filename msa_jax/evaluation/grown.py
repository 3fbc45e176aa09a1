"""A bank of any size, encoded once, of which every beginning is a memory too.

The same questions are asked at every size: all their documents lie in the first part, and a larger memory adds
documents behind it, so that scores of two sizes differ by what was added alone. Memories of several tasks may share
the haystack behind them: each is a namespace of one bank on disk. Encoding can be interrupted and goes on, and what is
there can be asked meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from msa_jax.bank import BankDocument, DocumentEncoder, MemoryStore
from msa_jax.bank.reader import BankReader
from msa_jax.bank.table import NAMESPACE, NUMBER, TOKENS, key_of
from msa_jax.data import Document, Question, Renderer
from msa_jax.errors import DataError
from msa_jax.evaluation.task import Inputs
from msa_jax.files import write_text
from msa_jax.inference.corpus import Corpus, StoredCorpus
from msa_jax.runs.open import reconfigured

Asked = TypeVar("Asked")
Blocks = Iterable[tuple[Sequence[Document], Sequence[int]]]


class GrownBank:
    """Documents of a source in a bank on disk, in the order in which they came.

    Every document is encoded, with a number of its own, even if another has the same text: a haystack of noise is as
    long as it says. Numbers are the bank's, not the source's.
    """

    def __init__(
        self, folder: str | pathlib.Path, encoder: DocumentEncoder, renderer: Renderer, of: Mapping[str, Any]
    ):  # fmt: skip
        """Open the bank in a folder, or make one.

        Args:
          renderer: cuts documents to their length.
          of: what the documents are made of: kept with the bank.

        Raises:
          DataError: the folder holds a memory of something else.
          BankError: a bank of another model, or one that cannot be read.
        """
        self.path = pathlib.Path(folder) / "bank"
        self._encoder, self._renderer = encoder, renderer
        known, wanted = pathlib.Path(folder) / "of.json", json.dumps(dict(of), sort_keys=True)
        if known.exists() and known.read_text() != wanted:
            there, here = json.loads(known.read_text()), json.loads(wanted)
            differing = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
            raise DataError(f"{folder} holds a memory with other {', '.join(differing)}; use another folder")
        if not known.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            MemoryStore.create(self.path, encoder.spec).close()
            write_text(known, wanted)
        with BankReader(self.path) as store:
            store.spec.require_same(encoder.spec, str(self.path))

    def fill(self, namespace: str, blocks: Blocks, *, tokens: int | None = None) -> int:
        """Encode what is missing of a namespace, of all blocks or until it has so many tokens; returns how many it has.

        Blocks must be the same every time: those that are there already are passed over, each is a commit.
        """
        with MemoryStore(self.path, writable=True) as store:
            rows = _rows_of(store, namespace)
            done, held, first = len(rows), int(store.table.columns[rows, TOKENS].sum()), 0
            with tqdm(desc=f"encode {namespace}", unit="tok", unit_scale=True, total=tokens, mininterval=5.0) as bar:
                bar.update(held)
                blocks = iter(blocks)
                while tokens is None or held < tokens:
                    documents, _ = next(blocks, ((), ()))
                    if not documents:
                        break
                    if first >= done:
                        added = self._append(store, namespace, documents)
                        held += added
                        bar.update(added)
                    first += len(documents)
        return held

    def _append(self, store: MemoryStore, namespace: str, documents: Sequence[Document]) -> int:
        first = store.manifest.next_text
        ordinals = list(range(first, first + len(documents)))
        numbers = [self._encoder.number(ordinal) for ordinal in ordinals]
        lists = [
            np.asarray(self._renderer.render_document(document, number), np.int32)
            for document, number in zip(documents, numbers, strict=True)
        ]
        kept = [BankDocument(d.id, d.text, title=d.title, namespace=namespace) for d in documents]
        store.append(kept, self._encoder.encode(lists, ordinals), range(len(documents)))
        return sum(map(len, lists))

    def parts(
        self, questions: Sequence[Question], tokens: int, namespace: str, behind: str | None = None
    ) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Memories of at most `tokens` tokens, from the beginning on, until every question has been in one.

        A size that holds all questions' documents is one part, a smaller one as many as are needed.

        Args:
          questions: their documents are in `namespace`.
          behind: a namespace whose beginning lies behind the end of this one.

        Yields:
          Rows [n] int64 of the bank's table, and which questions have their documents among them.

        Raises:
          DataError: a question's documents are missing, or further apart than `tokens`.
        """
        with BankReader(self.path) as store:
            rows, table = _rows_of(store, namespace), store.table
            more = _rows_of(store, behind) if behind else rows[:0]
            missing = [i for q in questions for i in q.supporting_ids if table.row_of(key_of(namespace, i)) is None]
            if missing:
                raise DataError(f"{self.path} lacks {len(missing)} documents that its questions need")
            wanted = [[table.row_of(key_of(namespace, i)) for i in q.supporting_ids] for q in questions]
            ends, behind_ends = (np.cumsum(table.columns[some, TOKENS]) for some in (rows, more))
        places = [np.searchsorted(rows, some) for some in wanted]
        left, first = set(range(len(questions))), 0
        while left:
            start = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, start + tokens, "right"))
            inside = {i for i in left if first <= min(places[i]) and max(places[i]) < last}
            if last <= first:
                raise DataError(f"{len(left)} questions have documents apart from each other by over {tokens} tokens")
            if inside:
                chosen = rows[first:last]
                if last == len(rows):
                    room = start + tokens - int(ends[-1])
                    chosen = np.concatenate([chosen, more[: np.searchsorted(behind_ends, room, "right")]])
                yield chosen, sorted(inside)
            left -= inside
            first = last

    def ask(
        self, rows: np.ndarray, namespace: str, questions: Sequence[Question],
        ask: Callable[[Corpus, Sequence[Question]], Asked],
    ) -> tuple[dict[str, Any], Asked, list[set[int]]]:  # fmt: skip
        """Ask some rows, on the device with content in int8.

        Returns:
          What was asked: its tokens, documents and MiB; what `ask` gave; and for every question the numbers of its
          documents.
        """
        corpus = StoredCorpus(self.path, rows=rows, content_dtype="int8")
        with contextlib.closing(corpus), BankReader(self.path) as store:
            columns, row_of = store.table.columns, store.table.row_of
            wanted = [{int(columns[row_of(key_of(namespace, i)), NUMBER]) for i in q.supporting_ids} for q in questions]
            about = {"tokens": int(columns[rows, TOKENS].sum()), "documents": len(rows)}
            about["bank_mib"] = corpus.bank.nbytes / 2**20
            answers = ask(corpus, questions)
        del corpus
        gc.collect()  # an engine is a ring of references, and there is no room for two banks of the largest size
        return about, answers, wanted


def _rows_of(store: BankReader, namespace: str) -> np.ndarray:
    """Rows of the live documents of a namespace, in order; none if there is no such namespace."""
    table = store.table
    if namespace not in table.namespaces:
        return np.zeros(0, np.int64)
    rows = table.alive
    return rows[table.columns[rows, NAMESPACE] == table.namespaces.index(namespace)]


def grown_bank(inputs: Inputs, made_of: Mapping[str, Any]) -> GrownBank:
    """The bank of a task, in its folder; `made_of` are settings that it depends on besides the run's data."""
    # In bfloat16, in which processors may be faster; questions are asked in the model's own dtype.
    model = reconfigured(inputs.model, dtype="bfloat16")
    run, row_len = inputs.run, inputs.run.row_len(model.config.chunk_size)
    encoder = DocumentEncoder(
        model, inputs.renderer.tokenizer, row_len=row_len, rows_per_step=run.evaluation.rows_per_step
    )  # fmt: skip
    # A folder may stand elsewhere another time.
    data = run.to_dict()["data"]
    data["folder"] = [pathlib.Path(folder).name for folder in data.get("folder", "").split(",")]
    return GrownBank(inputs.memory, encoder, inputs.renderer, {"data": data, **made_of})
