"""Documents into a bank on disk: tokens, packed rows, one jit-compiled encode step, commits of bounded size."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from msa_jax.bank.encoder import encode_bank
from msa_jax.bank.manifest import BankError, BankSpec
from msa_jax.bank.store import Encoded, MemoryStore
from msa_jax.bank.table import BankDocument
from msa_jax.data.batch import pack_documents
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.model import MSATransformer

# Rows are shorter by this factor, down to this many tokens.
_SHORTER, _SHORTEST = 4, 128


@dataclasses.dataclass
class Report:
    """What `add` or `update` did, and where the seconds went."""

    added: int = 0
    unchanged: int = 0
    encoded_tokens: int = 0
    tokenize_seconds: float = 0.0
    encode_seconds: float = 0.0
    store_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.encoded_tokens / max(1e-9, self.tokenize_seconds + self.encode_seconds + self.store_seconds)


class DocumentEncoder:
    """Texts to chunks, with one model and tokenizer. Steps have one shape for each of a few lengths of rows."""

    def __init__(
        self, model: MSATransformer, tokenizer: Tokenizer, *, row_len: int = 2048, rows_per_step: int = 16
    ):
        """Make an encoder.

        Args:
          row_len: tokens of the longest packed row, the most a document may have; a multiple of the model's chunk
            size. Documents of a quarter of it, a sixteenth and so on are packed into rows of that length.
          rows_per_step: rows of that length that pass the model at once, and as many tokens in shorter ones; sets
            the memory of activations.

        Raises:
          BankError: `row_len` is no multiple of the chunk size.
        """
        chunk = model.config.chunk_size
        if row_len % chunk:
            raise BankError(f"row_len must be a multiple of the model's chunk size {chunk}, got {row_len}.")
        self.model, self.tokenizer = model, tokenizer
        self.row_len, self.rows_per_step = row_len, rows_per_step
        # Attention within a row costs the square of its length, so short documents get short rows.
        self._row_lens = [row_len]
        while self._row_lens[0] // _SHORTER >= _SHORTEST and self._row_lens[0] // _SHORTER % chunk == 0:
            self._row_lens.insert(0, self._row_lens[0] // _SHORTER)
        self.spec = BankSpec.of(model)

    def tokens(self, document: BankDocument) -> list[int]:
        """Token ids of a document's text.

        Raises:
          BankError: there are none, or more than a row holds.
        """
        ids = self.tokenizer.encode(" " + document.text)
        if not ids:
            raise BankError(f"document {document.id!r} has no text: leave it out.")
        if len(ids) > self.row_len:
            raise BankError(
                f"document {document.id!r} has {len(ids)} tokens and the limit is {self.row_len}: raise row_len to a "
                f"multiple of {self.spec.chunk_size} of at least that, or split the document."
            )
        return ids

    def encode(self, token_lists: Sequence[Sequence[int]]) -> Encoded:
        """Chunks of documents given as token ids."""
        spec = self.spec
        lengths = np.array([-(-len(ids) // spec.chunk_size) for ids in token_lists], np.int64)
        tokens = np.array([len(ids) for ids in token_lists], np.int64)
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(lengths) else 0
        dtype = self.model.config.compute_dtype
        keys = np.zeros((spec.layers, total, spec.width), dtype)
        content_k = np.zeros((spec.layers, total, spec.kv_heads, spec.head_dim), dtype)
        content_v = np.zeros_like(content_k)
        shorter = 0
        for row_len in self._row_lens:
            mine = np.flatnonzero((tokens > shorter) & (tokens <= row_len))
            shorter = row_len
            if not len(mine):
                continue
            packed = pack_documents([token_lists[i] for i in mine], chunk_size=spec.chunk_size, row_len=row_len)
            rows = max(1, self.rows_per_step * self.row_len // row_len)
            bank = encode_bank(self.model, packed, rows_per_step=rows)
            # Packing keeps the order of documents, so their chunks follow each other.
            place = np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in mine])
            for target, part in ((keys, bank.routing_keys), (content_k, bank.content_k), (content_v, bank.content_v)):
                target[:, place] = np.asarray(part)
        return Encoded(keys, content_k, content_v, lengths, tokens)


def add(
    store: MemoryStore,
    documents: Iterable[BankDocument],
    encoder: DocumentEncoder,
    *,
    commit_tokens: int = 1 << 20,
    progress: bool = False,
) -> Report:
    """Add documents, encoding only texts that their namespace does not hold.

    A commit is made every `commit_tokens` tokens. A document that is there already with the same text is passed
    over, so the same call after an interruption goes on from the last commit.

    Args:
      store: open for writing, of the encoder's model.
      documents: an iterable that is read once, never held whole.
      commit_tokens: tokens encoded between commits; sets the memory needed.
      progress: show a progress bar of tokens.

    Raises:
      BankError: another model's bank; an id that is there with another text, or comes twice; a document without
        text or over the limit. What was committed before stays; of the rest nothing does.
    """
    return _ingest(store, documents, encoder, commit_tokens, progress, replace=False)


def update(
    store: MemoryStore,
    documents: Iterable[BankDocument],
    encoder: DocumentEncoder,
    *,
    commit_tokens: int = 1 << 20,
    progress: bool = False,
) -> Report:
    """Give documents that exist new texts, titles or metadata. See `add`.

    Raises:
      BankError: as `add`, and for an id that does not exist.
    """
    return _ingest(store, documents, encoder, commit_tokens, progress, replace=True)


def _ingest(store, documents, encoder, commit_tokens, progress, *, replace):
    store.spec.require_same(encoder.spec, str(store.path))
    report = Report()
    with tqdm(desc="add", unit="tok", unit_scale=True, mininterval=1.0, disable=not progress) as bar:
        for batch, token_lists, sources in _batches(store, documents, encoder, commit_tokens, report, replace):
            start = time.monotonic()
            encoded = encoder.encode(token_lists)
            stored = time.monotonic()
            (store.replace if replace else store.append)(batch, encoded, sources)
            report.encode_seconds += stored - start
            report.store_seconds += time.monotonic() - stored
            report.added += len(batch)
            report.encoded_tokens += int(encoded.tokens.sum())
            bar.update(int(encoded.tokens.sum()))
    return report


def _batches(
    store, documents, encoder, commit_tokens, report, replace
) -> Iterator[tuple[list[BankDocument], list[list[int]], list[int]]]:
    """Documents of one commit each, the token lists of their new texts, and where each document's text is."""
    batch, token_lists, sources = [], [], []
    ids: set[tuple[str, str]] = set()
    place: dict[tuple[str, str], int] = {}
    size = 0
    start = time.monotonic()
    for document in documents:
        key = document.namespace, document.id
        row = store.table.row_of(*key)
        if key in ids:
            raise BankError(f"document {document.id!r} of namespace {document.namespace!r} comes twice: rename one.")
        if replace and row is None:
            raise BankError(f"no document {document.id!r} in namespace {document.namespace!r}: `add` it instead.")
        if not replace and row is not None:
            if store.table.digests[row] != document.digest:
                raise BankError(
                    f"document {document.id!r} of namespace {document.namespace!r} is there with another text: "
                    "`update` it, or give it another id."
                )
            report.unchanged += 1
            continue
        ids.add(key)
        text = document.namespace, document.digest
        known = store.table.row_with(*text)
        if known is not None:
            sources.append(-1 - known)
        else:
            if text not in place:
                place[text] = len(token_lists)
                token_lists.append(encoder.tokens(document))
                size += len(token_lists[-1])
            sources.append(place[text])
        batch.append(document)
        if size >= commit_tokens:
            report.tokenize_seconds += time.monotonic() - start
            yield batch, token_lists, sources
            batch, token_lists, sources = [], [], []
            place, size, start = {}, 0, time.monotonic()
    report.tokenize_seconds += time.monotonic() - start
    if batch:
        yield batch, token_lists, sources
