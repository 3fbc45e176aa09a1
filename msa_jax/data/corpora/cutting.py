"""Long documents of a corpus cut into documents that fit, and questions pointed at the blocks that answer them."""

import dataclasses
import logging

from msa_jax.data.chunker import split_text
from msa_jax.data.corpora.corpus import CorpusSource
from msa_jax.data.episodes import SampleForm, longest_sample
from msa_jax.data.records import Document, Question
from msa_jax.data.samples import Renderer
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError

_LOG = logging.getLogger(__name__)


def cut_documents(source: CorpusSource, tokenizer: Tokenizer, max_tokens: int, *, titles: bool = False) -> CorpusSource:
    """The same corpus with no text of more than `max_tokens` tokens.

    A longer text becomes the documents `id/1`, `id/2`, ... of whole sentences (`split_text`), all with its
    title. A question it supports is then supported by the first block that holds one of the question's
    answers, letter case aside, or its hidden text, or if none does by the first block.
    With `titles` every text begins with its title, as `title: text`, unless that takes more than half of `max_tokens`.
    Raises DataError when `max_tokens` could not hold every single character.
    """
    documents: list[Document] = []
    blocks: dict[str, list[Document]] = {}
    heads = [f"{d.title}:" if titles and d.title.strip() else "" for d in source.documents]
    head_sizes = [len(ids) if ids else 0 for ids in tokenizer.encode_batch([" " + h if h else "" for h in heads])]
    sizes = map(len, tokenizer.encode_batch([" " + document.text for document in source.documents]))
    for document, size, head, head_size in zip(source.documents, sizes, heads, head_sizes, strict=True):
        if head_size > max_tokens // 2:
            head, head_size = "", 0
        room = max_tokens - head_size
        if size <= room:
            documents.append(dataclasses.replace(document, text=f"{head} {document.text}") if head else document)
            continue
        texts = [text for text in split_text(document.text, tokenizer, room) if text.strip()]
        texts = [f"{head} {text}" for text in texts] if head else texts
        parts = [Document(f"{document.id}/{i}", document.title, text) for i, text in enumerate(texts, 1)]
        blocks[document.id] = parts
        documents += parts

    def supporting(question: Question) -> tuple[str, ...]:
        found: list[str] = []
        wanted = [text.lower() for text in (*question.answers, question.hidden) if text]
        for name in question.supporting_ids:
            parts = blocks.get(name)
            if parts is None:
                found.append(name)
                continue
            holding = (part.id for part in parts if any(text in part.text.lower() for text in wanted))
            found.append(next(holding, parts[0].id))
        return tuple(found)

    questions = [dataclasses.replace(q, supporting_ids=supporting(q)) for q in source.questions]
    return source.with_(documents, questions)


def fitting_questions(
    source: CorpusSource,
    renderer: Renderer,
    question_len: int,
    *,
    samples: SampleForm = "chain",
    unanswerable: bool = False,
) -> CorpusSource:
    """The same corpus with those questions whose training samples all have at most `question_len` tokens.

    `samples`: the form of samples, see `render_episode`. `unanswerable`: samples that refuse an answer are among them.

    Raises DataError when none is left; what is left out is logged.
    """
    documents = {document.id: document for document in source.documents}

    def length(question: Question) -> int:
        supporting = [documents[i] for i in question.supporting_ids]
        return longest_sample(renderer, question, supporting, samples=samples, unanswerable=unanswerable)

    known = {q.id: length(q) for q in {q.id: q for q in source.questions}.values()}  # one may take several slots
    lengths = [known[q.id] for q in source.questions]
    kept = [q for q, size in zip(source.questions, lengths, strict=True) if size <= question_len]
    if not kept:
        raise DataError(
            f"none of {len(lengths)} questions fits question_len {question_len} with its reply, the shortest takes "
            f"{min(lengths)} tokens; raise question_len"
        )
    if len(kept) < len(lengths):
        _LOG.warning(
            "%d of %d questions do not fit question_len %d with their reply and are left out; the longest takes %d",
            len(lengths) - len(kept), len(lengths), question_len, max(lengths),
        )  # fmt: skip
    return source.with_(source.documents, kept)
