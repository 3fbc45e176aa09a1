"""Memory Interleave: the model names documents, their original text comes back, it goes on (paper section 3.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.data.batch import REPLY, ROUTING, TEMPLATE
from msa_jax.data.records import Document
from msa_jax.data.samples import Renderer
from msa_jax.inference.generate import Context, generate
from msa_jax.memory import MemoryBank
from msa_jax.model import MSATransformer

# Contexts are padded to a multiple of this, so that few lengths are compiled.
_LENGTH_BUCKET = 64


@dataclasses.dataclass
class Answer:
    """What became of one question.

    Attributes:
      text: the answer; empty if none was written.
      numbers: documents whose text was read, in the order in which the model named them.
      unknown: numbers that the model named and no document has.
      rounds: how often it retrieved.
      outcome: "answered"; "budget" when rounds ran out before the model ended retrieval and it then answered;
        "unfinished" when the answer has no end within its tokens.
      router_scores: [L_r, N] float32 document scores of the first round.
    """

    text: str = ""
    numbers: list[int] = dataclasses.field(default_factory=list)
    unknown: list[int] = dataclasses.field(default_factory=list)
    rounds: int = 0
    outcome: str = "unfinished"
    router_scores: np.ndarray | None = None


class _Conversation:
    """The growing context of one question: which tokens there are, and which of them route."""

    def __init__(self, question: str, renderer: Renderer):
        self.question, self.renderer = question, renderer
        self.tokens, self.roles = renderer.prompt(question)
        self.newest: tuple[int, int] | None = None  # range of the newest appended text
        self.answering = False
        self.done = False
        self.answer = Answer()

    def add(self, tokens: Sequence[int], role: int = REPLY) -> None:
        self.tokens += list(tokens)
        self.roles += [role] * len(tokens)

    def append_texts(self, documents: Sequence[tuple[Document, int]]) -> None:
        """Append original texts; from now on they route, with the question, and older ones no longer do."""
        if self.newest:
            begin, end = self.newest
            self.roles[begin:end] = [REPLY] * (end - begin)
        begin = len(self.tokens)
        for document, number in documents:
            self.add(self.renderer.appended(document, number), ROUTING)
        self.newest = (begin, len(self.tokens))

    def end_retrieval(self, written: Sequence[int]) -> None:
        """Close retrieval, whether or not the model wrote its end token itself, and restate the question."""
        end = self.renderer.end_of_retrieve()
        kept = list(written)[:-1] if list(written)[-1:] == end else []
        self.add(kept + end)
        self.add(self.renderer.restated(self.question))
        self.answering = True


def _take_turn(talk: _Conversation, written: list[int], library: Mapping[int, Document], max_rounds: int) -> None:
    """Advance one conversation by what the model has just written."""
    tokenizer = talk.renderer.tokenizer
    template = tokenizer.template
    if talk.answering:
        ended = written[-1:] == [tokenizer.token_id(template.end)]
        talk.answer.text = tokenizer.decode(written[:-1] if ended else written, skip_special=True).strip()
        if not ended:
            talk.answer.outcome = "unfinished"
        elif talk.answer.outcome != "budget":
            talk.answer.outcome = "answered"
        talk.done = True
        return
    if written[-1:] != [tokenizer.token_id(template.reference_end)]:
        talk.end_retrieval(written)  # its own end of retrieval, or no reference within the tokens allowed
        return
    named = tokenizer.parse_numbers(written)
    talk.answer.unknown += [n for n in named if n not in library]
    new = [n for n in dict.fromkeys(named) if n in library and n not in talk.answer.numbers]
    if not new:
        talk.end_retrieval([])  # nothing that it has not read already: more rounds would repeat themselves
        return
    talk.add(written)
    talk.answer.numbers += new
    talk.answer.rounds += 1
    talk.append_texts([(library[n], n) for n in new])
    if talk.answer.rounds >= max_rounds:
        talk.answer.outcome = "budget"
        talk.end_retrieval([])


def interleave(
    model: MSATransformer,
    bank: MemoryBank | None,
    library: Mapping[int, Document],
    questions: Sequence[str],
    renderer: Renderer,
    *,
    max_rounds: int = 4,
    max_new_tokens: int = 32,
    batch_size: int = 64,
) -> Iterator[Answer]:
    """Ask questions of a bank; greedy. Answers come in the order of the questions, batch by batch.

    Each round prefills the whole context, and the question and the newest appended text route.

    Args:
      model: the model that encoded `bank`.
      bank: the memory; None asks without any.
      library: the original text of every document number.
      questions: any number of them.
      renderer: the template and tokenizer that the model was trained with.
      max_rounds: after this many retrievals the model has to answer.
      max_new_tokens: tokens that one turn, a reference or the answer, may have.
      batch_size: questions asked together.

    Raises:
      ValueError: `max_rounds`, `max_new_tokens` or `batch_size` below 1.
    """
    if min(max_rounds, max_new_tokens, batch_size) < 1:
        raise ValueError("interleave: max_rounds, max_new_tokens and batch_size must be at least 1.")
    graphdef, params = nnx.split(model)
    tokenizer = renderer.tokenizer
    template = tokenizer.template
    stops = tuple(
        tokenizer.token_id(t) for t in (template.reference_end, template.end_of_retrieve, template.end)
    )
    prefix = jnp.asarray(renderer.prefix, jnp.int32)
    for begin in range(0, len(questions), batch_size):
        talks = [_Conversation(q, renderer) for q in questions[begin : begin + batch_size]]
        first = True
        while not all(t.done for t in talks):
            active = [t for t in talks if not t.done]
            context = _pad(active, batch_size, tokenizer.pad_id)
            result = generate(
                graphdef, params, prefix, context, bank, max_new_tokens=max_new_tokens, stop_tokens=stops
            )
            if first and result.document_scores is not None:
                scores = np.asarray(result.document_scores)
                for i, talk in enumerate(active):
                    talk.answer.router_scores = scores[:, i]
            first = False
            for talk, row in zip(active, np.asarray(result.tokens), strict=False):
                _take_turn(talk, [int(t) for t in row if t >= 0], library, max_rounds)
        yield from (t.answer for t in talks)


def _pad(talks: Sequence[_Conversation], rows: int, pad_id: int) -> Context:
    """Right-padded context; rows without a conversation hold one padding token that does not route."""
    longest = max(len(t.tokens) for t in talks)
    width = -(-longest // _LENGTH_BUCKET) * _LENGTH_BUCKET
    tokens = np.full((rows, width), pad_id, np.int32)
    roles = np.full((rows, width), TEMPLATE, np.int32)
    mask = np.zeros((rows, width), bool)
    mask[:, 0] = True
    for i, talk in enumerate(talks):
        size = len(talk.tokens)
        tokens[i, :size], roles[i, :size], mask[i, :size] = talk.tokens, talk.roles, True
    return Context(tokens=jnp.asarray(tokens), roles=jnp.asarray(roles), mask=jnp.asarray(mask))
