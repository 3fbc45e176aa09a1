"""A corpus of stories: many in one bank, each question sees the earlier statements of its own."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from msa_jax.bank import encode_bank
from msa_jax.data import Renderer, pack_documents
from msa_jax.data.sources.babi import Story
from msa_jax.errors import QuestionError
from msa_jax.inference.corpus import Original, View
from msa_jax.inference.slots import Visibility
from msa_jax.model import MSATransformer


class StoryCorpus:
    """Stories as namespaces, in which a document comes at its line and a question sees what had come.

    The namespace of a question at line 7 of a story is "{story id}@7". See `msa_jax.inference.corpus.Corpus`.
    """

    def __init__(self, model: MSATransformer, renderer: Renderer, stories: Sequence[Story], *, row_len: int):
        """Encode all statements, documents of at most `row_len` tokens."""
        self.names = tuple(story.id for story in stories)
        self._place = {name: i for i, name in enumerate(self.names)}
        owners = np.repeat(np.arange(len(stories)), [len(story.documents) for story in stories])
        self._numbers = np.array([n for story in stories for n in story.numbers], np.int64)
        self._documents = [dict(zip(story.numbers, story.documents, strict=True)) for story in stories]
        pairs = [pair for documents in self._documents for pair in documents.items()]
        packed = pack_documents(
            [renderer.render_document(document, number) for number, document in pairs],
            chunk_size=model.config.chunk_size, row_len=row_len, pad_id=renderer.tokenizer.pad_id,
        )  # fmt: skip
        self.bank = encode_bank(model, packed, rows_per_step=512)
        self.visibility = Visibility(
            namespaces=jnp.asarray(owners.astype(np.int32)), born=jnp.asarray(self._numbers.astype(np.int32))
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def view(self, namespaces: Sequence[str] | None) -> View:
        (asked,) = namespaces or ("",)
        name, _, line = asked.rpartition("@")
        if name not in self._place:
            raise QuestionError(f"no story {name!r}: name one as {self.names[0]}@7, what had come before line 7.")
        allowed = np.arange(len(self.names)) == self._place[name]
        return View(allowed, seen=int(line) - 1)

    def find(self, number: int, view: View) -> Original | None:
        place = int(np.flatnonzero(view.allowed)[0])
        document = self._documents[place].get(number) if number <= view.seen else None
        return document and Original(document, self.names[place])

    def numbers(self, places: np.ndarray) -> np.ndarray:
        return self._numbers[places]
