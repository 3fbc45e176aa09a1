"""Documents into a bank on disk: a thread tokenises, this one encodes, another one commits."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from msa_jax.bank.document_encoder import DocumentEncoder
from msa_jax.bank.manifest import BankSpec
from msa_jax.bank.numbers import Numbers
from msa_jax.bank.table import TEXT_KEY, BankDocument, Key
from msa_jax.bank.writer import BankWriter
from msa_jax.errors import BankError

# Texts given to the tokenizer together: it takes them in parallel.
_TOKENIZED_AT_ONCE = 64
# A commit holds at most this many bytes of chunks, and tokens; two or three commits' worth are in memory at a time.
_COMMIT_BYTES, _COMMIT_TOKENS, _COMMIT_DOCUMENTS = 1 << 27, 1 << 20, 1 << 15


@dataclasses.dataclass
class Report:
    """What `add` or `update` did, and where the time went.

    The three steps overlap: encoding is what everything else should wait for.

    Attributes:
      added, unchanged: documents written, and passed over because they were there.
      encoded_tokens: tokens that passed the model.
      seconds: from start to end.
      tokenize_seconds: reading, looking up and tokenising documents, in a thread of its own.
      encode_seconds: computing, and fetching results from the devices.
      store_seconds: writing and committing, in a thread of its own.
      waited_for_documents, waited_for_store: seconds that encoding stood still for the other two.
    """

    added: int = 0
    unchanged: int = 0
    encoded_tokens: int = 0
    seconds: float = 0.0
    tokenize_seconds: float = 0.0
    encode_seconds: float = 0.0
    store_seconds: float = 0.0
    waited_for_documents: float = 0.0
    waited_for_store: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.encoded_tokens / max(1e-9, self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Rounded for printing, with rates and shares of the time."""
        shares = {
            f"{name}_share": round(seconds / max(1e-9, self.seconds), 3)
            for name, seconds in (
                ("compute", self.encode_seconds),
                ("waiting_for_documents", self.waited_for_documents),
                ("waiting_for_store", self.waited_for_store),
            )
        }
        values = {name: round(value, 3) for name, value in dataclasses.asdict(self).items()}
        return values | {"tokens_per_second": round(self.tokens_per_second)} | shares


def commit_tokens_of(spec: BankSpec) -> int:
    """Tokens that a commit holds by default."""
    return min(_COMMIT_TOKENS, max(1, _COMMIT_BYTES // spec.bytes_per_chunk) * spec.chunk_size)


@dataclasses.dataclass
class _Batch:
    """Documents of one commit; `sources` is as in `MemoryStore.append`."""

    documents: list[BankDocument] = dataclasses.field(default_factory=list)
    token_lists: list[np.ndarray] = dataclasses.field(default_factory=list)
    ordinals: list[int] = dataclasses.field(default_factory=list)
    untokenised: list[BankDocument] = dataclasses.field(default_factory=list)
    characters: int = 0
    sources: list[int] = dataclasses.field(default_factory=list)
    unchanged: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def tokenize(self, encoder: DocumentEncoder, numbers: Numbers) -> None:
        ordinals = numbers.take(len(self.untokenised))
        lists = encoder.tokens(self.untokenised, [encoder.number(ordinal) for ordinal in ordinals])
        self.token_lists += lists
        self.ordinals += ordinals
        self.tokens += sum(map(len, lists))
        self.untokenised, self.characters = [], 0


def ingest(
    store: BankWriter,
    documents: Iterable[BankDocument],
    encoder: DocumentEncoder,
    numbers: Numbers,
    *,
    replace: bool,
    commit_tokens: int | None = None,
    progress: bool = False,
    total: int | None = None,
) -> Report:
    """What `MemoryStore.add` and, with `replace`, `MemoryStore.update` do; `numbers` is for new texts."""
    store.require_writable()
    store.spec.require_same(encoder.spec, str(store.path))
    report, begin = Report(), time.monotonic()
    commit_tokens = commit_tokens or commit_tokens_of(store.spec)
    write = store.replace if replace else store.append
    writing: concurrent.futures.Future | None = None

    def commit(batch, encoded):
        start = time.monotonic()
        write(batch.documents, encoded, batch.sources)
        report.store_seconds += time.monotonic() - start
        report.added += len(batch.documents)
        report.encoded_tokens += batch.tokens
        bar.set_postfix_str(f"{report.encoded_tokens / (time.monotonic() - begin):,.0f} tok/s", refresh=False)
        bar.update(len(batch.documents))

    def finish_writing():
        start = time.monotonic()
        if writing is not None:
            writing.result()
        report.waited_for_store += time.monotonic() - start

    name = "update" if replace else "add"
    with (
        tqdm(desc=name, unit="doc", total=total, mininterval=1.0, disable=not progress) as bar,
        concurrent.futures.ThreadPoolExecutor(1) as writer,
    ):
        batches = _ahead(_batches(store, documents, encoder, numbers, commit_tokens, replace))
        try:
            while True:
                start = time.monotonic()
                batch = next(batches, None)
                report.waited_for_documents += time.monotonic() - start
                if batch is None:
                    break
                report.unchanged += batch.unchanged
                report.tokenize_seconds += batch.seconds
                bar.update(batch.unchanged)
                if batch.documents:
                    start = time.monotonic()
                    encoded = encoder.encode(batch.token_lists, batch.ordinals)
                    report.encode_seconds += time.monotonic() - start
                    finish_writing()
                    writing = writer.submit(commit, batch, encoded)
                    del encoded
        finally:
            batches.close()
            finish_writing()
    report.seconds = time.monotonic() - begin
    return report


def _batches(store, documents, encoder, numbers, commit_tokens, replace) -> Iterator[_Batch]:
    """Documents of one commit each, tokenised; runs ahead of the commits of the batches that it gave out."""
    table, first_row = store.table, store.manifest.rows
    next_row = first_row
    # Rows that ids and texts will have, of documents that the table does not show yet.
    ids: dict[Key, int] = {}
    texts: dict[Key, int] = {}
    batch, start = _Batch(), time.monotonic()
    for document in documents:
        what = f"document {document.id!r} of namespace {document.namespace!r}"
        row = ids.get(document.id_key, table.row_of(document.id_key))
        if row is None and replace:
            raise BankError(f"no document {document.id!r} in namespace {document.namespace!r}: `add` it instead.")
        if row is not None and row >= first_row:
            raise BankError(f"{what} comes twice: rename one.")
        if row is not None and not replace:
            if tuple(table.columns[row, TEXT_KEY : TEXT_KEY + 2].tolist()) != document.text_key:
                raise BankError(f"{what} is there with another text: `update` it, or give it another id.")
            batch.unchanged += 1
        else:
            held = texts.get(document.text_key, table.row_with(document.text_key))
            if held is None:
                batch.sources.append(len(batch.token_lists) + len(batch.untokenised))
                batch.untokenised.append(document)
                batch.characters += len(document.text)
            else:
                # A text of this very batch is in its token lists, else a row has it or will.
                first = next_row - len(batch.documents)
                batch.sources.append(batch.sources[held - first] if held >= first else -1 - held)
            ids[document.id_key] = texts[document.text_key] = next_row
            next_row += 1
            batch.documents.append(document)
        # Texts seldom have more tokens than characters.
        if len(batch.untokenised) >= _TOKENIZED_AT_ONCE or batch.tokens + batch.characters >= commit_tokens:
            batch.tokenize(encoder, numbers)
        if batch.tokens >= commit_tokens or max(len(batch.documents), batch.unchanged) >= _COMMIT_DOCUMENTS:
            batch.tokenize(encoder, numbers)
            batch.seconds = time.monotonic() - start
            yield batch
            batch, start, shown = _Batch(), time.monotonic(), len(table.columns)
            ids = {key: row for key, row in ids.items() if row >= shown}
            texts = {key: row for key, row in texts.items() if row >= shown}
    batch.tokenize(encoder, numbers)
    batch.seconds = time.monotonic() - start
    yield batch


def _ahead(iterator: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same items, the next one being made in a thread while the last one is used."""
    items: queue.Queue = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item):
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=0.1)
                return

    def make():
        try:
            for item in iterator:
                put((item, None))
                if stop.is_set():
                    return
            put((None, None))
        except BaseException as e:
            put((None, e))

    # A daemon, as reading documents from a terminal or a pipe may never return.
    threading.Thread(target=make, name="documents", daemon=True).start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
