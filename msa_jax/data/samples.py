"""From documents and questions to tokens, by the template. Training and inference render with the same functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from msa_jax.data.batch import REPLY, ROUTING, TEMPLATE, Sample
from msa_jax.data.records import Document, Question
from msa_jax.data.templates import FIELD
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError


@dataclass(frozen=True)
class LossWeights:
    """Weights of a reply's tokens as targets; all others have none.

    Attributes:
      id: document numbers that the model writes, and the end of retrieval.
      answer: tokens of the answer.
      trailing_id: the number behind a quoted document.
      leading_id: the number in front of a quoted document.
    """

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

    def __init__(self, tokenizer: Tokenizer, document_len: int | None = None, weights: LossWeights | None = None):
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

    def references(self, numbers: Sequence[int]) -> list[int]:
        """What the model writes to ask for several documents in one turn: only the last reference ends it."""
        spelt = [self.reference(number) for number in numbers]
        return [token for reference in spelt[:-1] for token in reference[:-1]] + spelt[-1] if spelt else []

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

    def sample(
        self, question: Question, supporting: Sequence[tuple[Document, int]], *, at_once: bool = False
    ) -> Sample:
        """The whole chain of one question: prompt, each supporting document in turn, the answer.

        With `at_once` all documents are named in one turn, and then come their texts.
        """
        context = self.question(question)
        ids = (self.weights.leading_id, self.weights.trailing_id)
        if at_once:
            context.add(self.references([number for _, number in supporting]), REPLY, self.weights.id)
        for document, number in supporting:
            if not at_once:
                context.add(self.reference(number), REPLY, self.weights.id)
            context.add(*self._quoted(document, number, ids))
        self._close(context, question, question.answers)
        return context

    def question(self, question: Question) -> Sample:
        """The question alone, with the head of a reply that is not trained."""
        tokens, roles = self.prompt(question.question)
        return Sample(tokens, roles, [0.0] * len(tokens))

    def step(self, question: Question, supporting: Sequence[tuple[Document, int]], read: int) -> Sample:
        """One retrieval step of a question whose first `read` supporting documents have been read.

        The context, roles included, is what inference feeds at that point: the question routes, and so does the text
        that was read last. What is written next carries the loss: the next document's number, or if there is none
        the end of retrieval and the answer. What is quoted carries none, whatever the weights say.
        """
        context = self.question(question)
        for i, (document, number) in enumerate(supporting[:read], 1):
            context.add(self.reference(number))
            context.add(self._quoted(document, number)[0], ROUTING if i == read else REPLY)
        if read < len(supporting):
            context.add(self.reference(supporting[read][1]), REPLY, self.weights.id)
        else:
            self._close(context, question, question.answers)
        return context

    def refusal(self, question: Question) -> Sample:
        """The reply to a question whose documents are not in the memory: retrieval ends at once, then `not_found`."""
        context = self.question(question)
        self._close(context, question, [self.tokenizer.template.not_found])
        return context

    def _quoted(self, document: Document, number: int, id_weights: tuple[float, ...] = (0.0, 0.0)):
        """What `appended` gives, its role and its loss weights."""
        tokens, weights = self._appended.fill(self.tokenizer.number_ids(number), self.body(document), id_weights)
        return tokens, REPLY, weights

    def _close(self, context: Sample, question: Question, answers: Sequence[str]) -> None:
        """End retrieval and, if there is an answer, repeat the question and give the first one."""
        context.add(self._end_of_retrieve, REPLY, self.weights.id)
        if answers:
            context.add(self.restated(question.question))
            context.add(self.answer(answers[0]), REPLY, self.weights.answer)

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
        self, number: list[int], text: Sequence[int] | np.ndarray = (), id_weights: tuple[float, ...] = (0.0, 0.0)
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
