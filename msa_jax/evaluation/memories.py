"""Memories to evaluate on: documents of a source up to a number of tokens, and questions about them."""

from __future__ import annotations

import dataclasses

import numpy as np

from msa_jax.data import Document, Question, Renderer, Source, pack_documents
from msa_jax.data.batch import DocumentBatch
from msa_jax.errors import DataError

# Documents whose mean length tells how many make up a memory.
_SAMPLE = 512


@dataclasses.dataclass(frozen=True)
class Memory:
    """A memory before encoding.

    Attributes:
      packed: its documents, rendered and packed.
      originals: document by number, with its original text.
      numbers: number of the document at each index of the bank.
      place: index in the bank by document id.
      questions: what is asked.
      tokens: rendered tokens of all documents.
    """

    packed: DocumentBatch
    originals: dict[int, Document]
    numbers: list[int]
    place: dict[str, int]
    questions: list[Question]
    tokens: int

    def wanted(self, question: Question) -> set[int]:
        """Numbers of the documents that support a question."""
        return {self.numbers[self.place[i]] for i in question.supporting_ids}


def build_memory(
    source: Source,
    renderer: Renderer,
    *,
    memory_tokens: int,
    num_questions: int,
    chunk_size: int,
    row_len: int,
    seed: int,
) -> Memory:
    """Draw documents of about `memory_tokens` tokens together, those that answer the questions among them.

    Raises:
      DataError: the memory is too small for its questions, or the source is smaller than the memory.
    """
    id_digits = renderer.tokenizer.template.id_digits
    rng = np.random.default_rng([seed, memory_tokens])
    fewest = max(1, min(_SAMPLE, memory_tokens // row_len))
    _, blocks = source.memory(fewest, 0, np.random.default_rng(seed), id_digits=id_digits)
    lengths = [len(renderer.render_document(d, n)) for some in blocks for d, n in zip(*some, strict=True)]
    num_documents = max(1, round(memory_tokens / np.mean(lengths)))
    if num_documents < num_questions:
        raise DataError(
            f"{memory_tokens} tokens of memory are about {num_documents} documents, too few for {num_questions} "
            "questions about different ones; ask for more memory, or lower evaluation.num_questions"
        )
    questions, blocks = source.memory(num_documents, num_questions, rng, id_digits=id_digits)
    tokens, originals, numbers, place = [], {}, [], {}
    for documents, some in blocks:
        for document, number in zip(documents, some, strict=True):
            tokens.append(np.asarray(renderer.render_document(document, number), np.int32))
            originals[number] = document
            place[document.id] = len(numbers)
            numbers.append(number)
    return Memory(
        packed=pack_documents(tokens, chunk_size=chunk_size, row_len=row_len, pad_id=renderer.tokenizer.pad_id),
        originals=originals,
        numbers=numbers,
        place=place,
        questions=questions,
        tokens=sum(map(len, tokens)),
    )
