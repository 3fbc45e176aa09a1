"""A memory of any size, encoded once into files, of which every beginning is a memory too.

The same questions are asked at every size: all their documents lie in the first part, and a larger memory adds
documents behind it, so that scores of two sizes differ by what was added alone. Routing keys are kept in bfloat16,
content in int8: 100M tokens of the tiny preset take 6.7 GB. Encoding can be interrupted and goes on.

Sizes: L_r router layers, C chunks, N documents, K key/value heads, D head dim, M = K * D.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from msa_jax.bank.encoder import RowEncoder
from msa_jax.bank.quantization import quantize_content
from msa_jax.data import Document, Question, Renderer, pack_documents
from msa_jax.errors import DataError
from msa_jax.evaluation.parts import Part, Piece, part_of
from msa_jax.files import write_text
from msa_jax.model import MSATransformer

_KEYS = jnp.dtype(jnp.bfloat16)

Blocks = Iterable[tuple[Sequence[Document], Sequence[int]]]


def _question(fields: dict) -> Question:
    return Question(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


class GrownMemory:
    """Encoded documents in a folder, in the order in which they came; another process may ask while one encodes.

    Attributes:
      numbers: [N] int64. place: index of each document by its id. questions: all of them.
      token_ends, chunk_ends: [N] int64, rendered tokens and chunks of the documents up to and with each.
      seconds: that encoding took, over all interruptions.
      longest: chunks of the longest document that there may be.
    """

    def __init__(
        self, folder: str | pathlib.Path, model: MSATransformer, renderer: Renderer, *, documents: int | None = None,
        of: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        """Open the files, or make them for `documents` documents at most.

        Args:
          of: what they are made of, the run and the seed say: kept with them, and refused if another is given later.

        Raises:
          DataError: the folder holds a memory of another form, or none and `documents` is not given.
        """
        self.folder, self.renderer, c = pathlib.Path(folder), renderer, model.config
        self._model, self._chunk = model, c.chunk_size
        self.folder.mkdir(parents=True, exist_ok=True)
        self._state = self.folder / "state.json"
        there = json.loads(self._state.read_text()) if self._state.exists() else None
        if documents is None:
            if there is None:
                raise DataError(f"{self.folder} holds no memory; encode one first")
            documents = there["form"]["documents"]
        per = -(-(renderer.body_len + renderer.document_overhead) // c.chunk_size)
        form = {
            "documents": documents, "layers": len(c.router_layers), "chunks": documents * per,
            "kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "chunk_size": c.chunk_size,
            "of": dict(of) if of is not None else there["form"].get("of", {}) if there else {},
        }  # fmt: skip
        form = json.loads(json.dumps(form))  # as it is read back: tuples are lists
        state = there or {"form": form, "done": 0, "seconds": 0}
        if {"of": {}} | state["form"] != form:
            raise DataError(f"{self.folder} holds a memory of {state['form']}, wanted is {form}; use another folder")
        self.done, self.seconds = state["done"], state["seconds"]
        self._form, self.longest = form, per
        layers, chunks, heads, width = form["layers"], form["chunks"], form["kv_heads"], form["head_dim"]
        self.keys = self._array("keys", (layers, chunks, heads * width), np.uint16).view(_KEYS)
        content, scales = (layers, chunks, heads, width), (layers, heads, chunks)
        self.content = [self._array(name, content, np.int8) for name in ("k", "v")]
        self.scales = [self._array(f"{name}_scale", scales, np.float32) for name in ("k", "v")]
        self.numbers = self._array("numbers", (documents,), np.int64)
        self.token_ends = self._array("token_ends", (documents,), np.int64)
        self.chunk_ends = self._array("chunk_ends", (documents,), np.int64)
        self.body_ends = self._array("body_ends", (documents,), np.int64)
        self.bodies = self._array("bodies", (documents * renderer.body_len,), np.int32)
        self.questions: list[Question] = []
        self.place: dict[str, int] = {}
        self._known = self.folder / "questions.json"
        if self._known.exists():
            known = json.loads(self._known.read_text())
            self.questions = [_question(q) for q in known["questions"]]
            self.place = known["place"]

    def _array(self, name, shape, dtype):
        path = self.folder / name
        return np.memmap(path, dtype, "r+" if path.exists() else "w+", shape=shape)

    def fill(
        self, questions: Sequence[Question], blocks: Blocks, *, rows_per_step: int, tokens: int | None = None,
        progress: bool = True,
    ) -> None:  # fmt: skip
        """Encode what is missing, of all blocks or until there are so many tokens.

        Blocks must be the same every time; those that are there already are passed over.
        """
        self.questions, self.place = list(questions), {}
        wanted = {i for q in questions for i in q.supporting_ids}
        encoder = RowEncoder(self._model)
        row_len = -(-(self.renderer.body_len + self.renderer.document_overhead) // self._chunk) * self._chunk
        first = 0
        total, unit = (len(self.numbers), "doc") if tokens is None else (tokens, "tok")
        with tqdm(
            total=total, desc="encode", unit=unit, unit_scale=True, mininterval=5.0, disable=not progress
        ) as bar:  # fmt: skip
            for documents, numbers in blocks:
                last = first + len(documents)
                self.place |= {d.id: first + i for i, d in enumerate(documents) if d.id in wanted}
                if last > self.done:
                    begin = time.monotonic()
                    self._encode(encoder, documents, numbers, first, row_len, rows_per_step)
                    self.done, self.seconds = last, self.seconds + time.monotonic() - begin
                    self._save()
                if len(self.place) == len(wanted) and not self._known.exists():
                    asked = [dataclasses.asdict(q) for q in self.questions]
                    write_text(self._known, json.dumps({"questions": asked, "place": self.place}))
                bar.update((last if tokens is None else min(self.tokens, tokens)) - bar.n)
                first = last
                if tokens is not None and self.tokens >= tokens:
                    break
        missing = wanted - self.place.keys()
        if missing:
            raise DataError(f"the memory lacks {len(missing)} documents that its questions need")

    def _save(self):
        write_text(self._state, json.dumps({"form": self._form, "done": self.done, "seconds": self.seconds}))

    def _encode(self, encoder, documents, numbers, first, row_len, rows_per_step):
        bodies = [np.asarray(self.renderer.body(d), np.int32) for d in documents]
        rendered = [self.renderer.render_tokens(b, n) for b, n in zip(bodies, numbers, strict=True)]
        packed = pack_documents(rendered, chunk_size=self._chunk, row_len=row_len)
        used = packed.chunk_documents < len(packed.starts)
        place = np.where(used, np.cumsum(used) - 1, -1)
        count, last = int(used.sum()), first + len(documents)
        states = encoder.arrays(count)
        encoder.encode(packed, states, place, rows_per_step=rows_per_step)
        ends = (self.chunk_ends, self.token_ends, self.body_ends)
        chunk, token, body = (int(x[first - 1]) if first else 0 for x in ends)
        where = slice(chunk, chunk + count)
        self.keys[:, where] = states[0].astype(_KEYS)
        for values, target, scales in zip(states[1:], self.content, self.scales, strict=True):
            target[:, where], scales[:, :, where] = quantize_content(values)
        sizes = np.array([len(b) for b in bodies])
        self.numbers[first:last] = numbers
        self.chunk_ends[first:last] = chunk + np.cumsum(packed.lengths)
        self.token_ends[first:last] = token + np.cumsum([len(r) for r in rendered])
        self.body_ends[first:last] = body + np.cumsum(sizes)
        self.bodies[body : body + sizes.sum()] = np.concatenate(bodies)

    def parts(
        self, tokens: int, *, behind: GrownMemory | None = None, room: tuple[int, int] = (0, 0)
    ) -> Iterator[Part]:
        """Memories of `tokens` tokens, from the beginning on, until every question has been in one.

        A size that holds all questions' documents is one part, a smaller one as many as are needed.

        Args:
          behind: a haystack that goes on where this memory ends; several memories may share it. Its documents have
            other numbers.
          room: banks are padded to so many documents and chunks: what asks banks of one shape is compiled once.

        Raises:
          DataError: one question's documents are further apart than `tokens`.
        """
        places = [[self.place[i] for i in q.supporting_ids] for q in self.questions]
        left, first = set(range(len(self.questions))), 0
        while left:
            start = int(self.token_ends[first - 1]) if first else 0
            last = self._until(start + tokens)
            inside = {i for i in left if first <= min(places[i]) and max(places[i]) < last}
            if last <= first:
                raise DataError(f"{len(left)} questions have documents apart from each other by over {tokens} tokens")
            if inside:
                pieces = [Piece(self, first, last)]
                if behind is not None and last == self.done:
                    rest = start + tokens - int(self.token_ends[last - 1])
                    pieces.append(Piece(behind, 0, behind._until(rest)))
                yield part_of(pieces, sorted(inside), room)
            left -= inside
            first = last

    @property
    def tokens(self) -> int:
        """Of all documents that are encoded."""
        return int(self.token_ends[self.done - 1]) if self.done else 0

    def _until(self, tokens: int) -> int:
        """How many documents have together at most so many tokens."""
        return int(np.searchsorted(self.token_ends[: self.done], tokens, "right"))
