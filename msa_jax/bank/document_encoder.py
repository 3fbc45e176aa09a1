"""Texts to chunks: numbered and framed, as tokens, in rows packed by length, through the encode step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msa_jax.bank.change import Encoded
from msa_jax.bank.encoder import RowEncoder
from msa_jax.bank.manifest import BankSpec
from msa_jax.bank.table import BankDocument
from msa_jax.data.batch import pack_documents
from msa_jax.data.samples import Renderer
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import BankError, DataError
from msa_jax.memory.places import behind, chunks_of
from msa_jax.model import MSATransformer

# Rows are shorter by this factor, down to this many tokens.
_SHORTER, _SHORTEST = 4, 128


class DocumentEncoder:
    """Texts to chunks, with one model and tokenizer, on all devices of this process.

    Steps have one shape for each of a few lengths of rows.

    Attributes:
      tokenizer, renderer: of what is encoded.
      row_len: tokens of the longest document, its frame included.
      spec: of banks that this encodes.
    """

    def __init__(self, model: MSATransformer, tokenizer: Tokenizer, *, row_len: int = 2048, rows_per_step: int = 16):
        """Make an encoder.

        Args:
          row_len: tokens of the longest packed row, the most a document may take; a multiple of the model's chunk
            size. Documents of a quarter of it, a sixteenth and so on are packed into rows of that length.
          rows_per_step: rows of that length that pass the model at once, and as many tokens in shorter ones; sets
            the memory of activations.

        Raises:
          BankError: `row_len` is no multiple of the chunk size.
        """
        chunk = model.config.chunk_size
        if row_len % chunk:
            raise BankError(f"row_len must be a multiple of the model's chunk size {chunk}, got {row_len}.")
        self.tokenizer, self.renderer = tokenizer, Renderer(tokenizer)
        self.row_len, self.rows_per_step = row_len, rows_per_step
        # Attention within a row costs the square of its length, so short documents get short rows.
        self.row_lens = [row_len]
        while self.row_lens[0] // _SHORTER >= _SHORTEST and self.row_lens[0] // _SHORTER % chunk == 0:
            self.row_lens.insert(0, self.row_lens[0] // _SHORTER)
        self.spec = BankSpec.of(model, tokenizer)
        self._rows = RowEncoder(model)

    def number(self, ordinal: int) -> int:
        """The number of a bank's text, by which the model names it.

        Raises:
          BankError: the template's numbers have run out.
        """
        try:
            return self.tokenizer.template.number(ordinal)
        except DataError as e:
            raise BankError(str(e)) from e

    def tokens(self, documents: Sequence[BankDocument], numbers: Sequence[int]) -> list[np.ndarray]:
        """Token ids, int32, of documents as the template frames them, each with its number.

        Raises:
          BankError: one has no text, or takes more than a row holds.
        """
        texts = self.tokenizer.encode_batch([" " + document.text for document in documents])
        lists = []
        for document, number, text in zip(documents, numbers, texts, strict=True):
            if not document.text or not text:
                raise BankError(f"document {document.id!r} has no text: leave it out.")
            ids = self.renderer.render_tokens(text, number)
            if len(ids) > self.row_len:
                raise BankError(
                    f"document {document.id!r} takes {len(ids)} tokens, number and frame included, and the limit is "
                    f"{self.row_len}: raise row_len to a multiple of {self.spec.chunk_size} of at least that, or split "
                    "the document."
                )
            lists.append(np.array(ids, np.int32))
        return lists

    def encode(self, token_lists: Sequence[Sequence[int] | np.ndarray], ordinals: Sequence[int]) -> Encoded:
        """Chunks of documents given as token ids, which say the numbers that `ordinals` have."""
        tokens = np.array([len(ids) for ids in token_lists], np.int64)
        lengths = -(-tokens // self.spec.chunk_size)
        starts = behind(lengths)
        targets = self._rows.arrays(int(lengths.sum()))
        shorter = 0
        for row_len in self.row_lens:
            mine = np.flatnonzero((tokens > shorter) & (tokens <= row_len))
            shorter = row_len
            if not len(mine):
                continue
            packed = pack_documents([token_lists[i] for i in mine], chunk_size=self.spec.chunk_size, row_len=row_len)
            # Packing keeps the order of documents, so their chunks follow each other.
            place = np.full(len(packed.chunk_documents), -1, np.int64)
            place[packed.chunk_documents < len(mine)] = chunks_of(starts[mine], lengths[mine])
            rows = max(1, self.rows_per_step * self.row_len // row_len)
            self._rows.encode(packed, targets, place, rows_per_step=rows)
        numbers = np.array([self.number(ordinal) for ordinal in ordinals], np.int64)
        return Encoded(*targets, lengths, tokens, np.array(ordinals, np.int64), numbers)
