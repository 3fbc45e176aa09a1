"""From an episode to token lists, by the template. Training and inference render with the same functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from msa_jax.data.batch import REPLY, ROUTING, TEMPLATE, Sample
from msa_jax.data.records import DataError, Document, Episode, Question
from msa_jax.data.templates import FIELD
from msa_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class LossWeights:
    """Weights of reply tokens as targets: generated ids, the answer, and the two ids of a quoted document."""

    id: float = 1.0
    answer: float = 1.0
    trailing_id: float = 0.5
    leading_id: float = 0.25


class Renderer:
    """Renders with one tokenizer and its template.

    A document's number and its text are encoded apart from what stands around them, so that both are the same
    tokens wherever they occur and a text can be encoded ahead of time.
    `document_len`: documents that would take more tokens have their text cut, never their ids; None cuts
    nothing.
    """

    def __init__(
        self, tokenizer: Tokenizer, document_len: int | None = None, weights: LossWeights | None = None
    ):
        template = tokenizer.template
        self.tokenizer = tokenizer
        self.weights = weights or LossWeights()
        self.prefix: list[int] = tokenizer.encode_frame(template.prefix)
        self._document = _Frame(tokenizer, template.document)
        self._reference = _Frame(tokenizer, template.reference)
        self._appended = _Frame(tokenizer, template.appended)
        self._reply_head = tokenizer.encode_frame(template.reply_head)
        self._end_of_retrieve = [tokenizer.token_id(template.end_of_retrieve)]
        self.document_overhead = self._document.literals + 2 * tokenizer.max_number_len
        if document_len is not None and document_len <= self.document_overhead:
            raise DataError(
                f"document_len {document_len} leaves no room for text: frame and ids take "
                f"{self.document_overhead} tokens"
            )
        self.body_len = None if document_len is None else document_len - self.document_overhead

    def body(self, document: Document) -> Sequence[int] | np.ndarray:
        """Token ids of a document's text, cut to fit `document_len`."""
        tokens = self.whole_body(document)
        return tokens if self.body_len is None else tokens[: self.body_len]

    def whole_body(self, document: Document) -> Sequence[int] | np.ndarray:
        """Token ids of all of a document's text."""
        return document.tokens if document.tokens is not None else self.tokenizer.encode(" " + document.text)

    def render_document(self, document: Document, number: int) -> list[int]:
        """Token ids of a document as the model encodes it."""
        return self.render_tokens(self.body(document), number)

    def render_tokens(self, text: Sequence[int] | np.ndarray, number: int) -> list[int]:
        """`render_document` of a text that is encoded already, and is not cut."""
        return self._document.fill(self.tokenizer.number_ids(number), text)[0]

    def text_start(self, number: int) -> int:
        """Which token of a rendered document is the first of its text."""
        return self._document.fill(self.tokenizer.number_ids(number), [-1])[0].index(-1)

    def prompt(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids and roles of the framed question and the reply's head; generation starts after it."""
        asked = self._text(self.tokenizer.template.question, "{question}", question)
        return asked + self._reply_head, [ROUTING] * len(asked) + [TEMPLATE] * len(self._reply_head)

    def reference(self, number: int) -> list[int]:
        """What the model writes to ask for a document."""
        return self._reference.fill(self.tokenizer.number_ids(number))[0]

    def appended(self, document: Document, number: int) -> list[int]:
        """The original text as the engine appends it after a reference."""
        return self.appended_body(self.body(document), number)

    def appended_body(self, body: Sequence[int] | np.ndarray, number: int) -> list[int]:
        """The same of a text given as token ids."""
        return self._appended.fill(self.tokenizer.number_ids(number), body)[0]

    def end_of_retrieve(self) -> list[int]:
        """What the model writes when it has all the documents it wants."""
        return list(self._end_of_retrieve)

    def restated(self, question: str) -> list[int]:
        """The question as the engine repeats it before the answer."""
        return self._text(self.tokenizer.template.restated, "{question}", question)

    def answer(self, answer: str) -> list[int]:
        """The framed answer, its end token included."""
        return self._text(self.tokenizer.template.reply_answer, "{answer}", answer)

    def sample(self, question: Question, supporting: Sequence[tuple[Document, int]]) -> Sample:
        """The whole chain of one question: prompt, each supporting document in turn, the answer."""
        tokens, roles = self.prompt(question.question)
        loss = [0.0] * len(tokens)
        ids = (self.weights.leading_id, self.weights.trailing_id)
        for document, number in supporting:
            spelt = self.tokenizer.number_ids(number)
            reference = self._reference.fill(spelt)[0]
            appended, weights = self._appended.fill(spelt, self.body(document), ids)
            tokens += reference + appended
            loss += [self.weights.id] * len(reference) + weights
        tokens += self._end_of_retrieve
        loss += [self.weights.id] * len(self._end_of_retrieve)
        if question.answers:
            restated, answer = self.restated(question.question), self.answer(question.answers[0])
            tokens += restated + answer
            loss += [0.0] * len(restated) + [self.weights.answer] * len(answer)
        return Sample(tokens, roles + [REPLY] * (len(tokens) - len(roles)), loss)

    def episode(self, episode: Episode) -> tuple[list[list[int]], list[Sample], np.ndarray]:
        """Rendered documents, one sample a question, and which documents are relevant, bool [B, N]."""
        documents = [
            self.render_document(d, n) for d, n in zip(episode.documents, episode.numbers, strict=True)
        ]
        place = episode.index_of()
        relevant = np.zeros((len(episode.questions), len(documents)), bool)
        samples = []
        for i, question in enumerate(episode.questions):
            found = [place[d] for d in question.supporting_ids]
            relevant[i, found] = True
            samples.append(self.sample(question, [(episode.documents[j], episode.numbers[j]) for j in found]))
        return documents, samples, relevant

    def _text(self, frame: str, field: str, value: str) -> list[int]:
        """A frame with one field; text between special tokens is encoded whole, and `value` adds none."""
        ids: list[int] = []
        for special, piece in self.tokenizer.split_frame(frame):
            if special:
                ids.append(self.tokenizer.token_id(piece))
            else:
                ids += self.tokenizer.encode(piece.replace(field, value))
        return ids


class _Frame:
    """A frame of ids and a text, whose literal parts are encoded once."""

    def __init__(self, tokenizer: Tokenizer, frame: str):
        self._parts: list[list[int] | str] = []
        self.literals = 0
        pieces = FIELD.split(frame)
        for i, piece in enumerate(pieces):
            if i % 2:
                self._parts.append(piece)
                continue
            if i + 1 < len(pieces) and pieces[i + 1] == "text":
                piece = piece.removesuffix(" ")  # the space belongs to the text: " word" is one token
            ids = tokenizer.encode_frame(piece)
            self._parts.append(ids)
            self.literals += len(ids)

    def fill(
        self,
        number: list[int],
        text: Sequence[int] | np.ndarray = (),
        id_weights: tuple[float, ...] = (0.0, 0.0),
    ) -> tuple[list[int], list[float]]:
        """Token ids, and loss weights in which the n-th id has `id_weights[n]` and all else 0."""
        tokens: list[int] = []
        weights: list[float] = []
        weight = iter(id_weights)
        for part in self._parts:
            ids = number if part == "id" else text if part == "text" else part
            tokens += ids.tolist() if isinstance(ids, np.ndarray) else ids
            weights += [next(weight) if part == "id" else 0.0] * len(ids)
        return tokens, weights
