"""Retrieval alone: what the router ranks first of many passages, and how rankings are joined.

Sizes: B questions, T active tokens, L_r router layers, N documents, S passages.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.bank import encode_bank
from msa_jax.context import Route
from msa_jax.data import Document, Renderer, pack_documents
from msa_jax.data.batch import ROUTING
from msa_jax.data.splits import draw_numbers
from msa_jax.memory import DocumentLayout, MemoryBank
from msa_jax.memory.places import chunks_of
from msa_jax.model import MSATransformer
from msa_jax.routing import need_scores

_TOKENS_MULTIPLE = 32


def encode_documents(
    model: MSATransformer, renderer: Renderer, documents: Sequence[Document], *, row_len: int, seed: int = 0
) -> MemoryBank:
    """A bank of the documents in their order, under numbers drawn by `seed`.

    Raises:
      DataError: a document does not fit `row_len`, or the template has too few numbers.
    """
    template = renderer.tokenizer.template
    numbers = draw_numbers(np.random.default_rng(seed), len(documents), template.id_digits).tolist()
    tokens = [renderer.render_document(d, n) for d, n in zip(documents, numbers, strict=True)]
    packed = pack_documents(
        tokens, chunk_size=model.config.chunk_size, row_len=row_len, pad_id=renderer.tokenizer.pad_id
    )
    return encode_bank(model, packed, progress=True)


def part_of(bank: MemoryBank, documents: Sequence[int]) -> MemoryBank:
    """The bank of some of its documents, in the order given."""
    starts, lengths = np.asarray(bank.layout.starts)[documents], np.asarray(bank.layout.lengths)[documents]
    layout = DocumentLayout.from_chunk_documents(np.repeat(np.arange(len(lengths)), lengths), len(lengths))
    take = functools.partial(jnp.take, indices=jnp.asarray(chunks_of(starts, lengths)), axis=1)
    return MemoryBank(take(bank.routing_keys), take(bank.content_k), take(bank.content_v), layout)


@functools.partial(jax.jit, static_argnames="graphdef")
def _template(graphdef, params, tokens):
    return nnx.merge(graphdef, params).encode_template(tokens)


@functools.partial(jax.jit, static_argnames="graphdef")
def _scores(graphdef, params, tokens, lengths, template, read):
    model = nnx.merge(graphdef, params)
    return model.prefill(tokens, lengths=lengths, template=template, read=read).document_scores


def router_scores(
    model: MSATransformer,
    renderer: Renderer,
    bank: MemoryBank,
    questions: Sequence[str],
    *,
    batch_size: int = 16,
    mean_over_tokens: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """Document scores [L_r, N] float32 of each question as the first round of Memory Interleave has them.

    Yields (which question, its scores), questions of about the same length together. `mean_over_tokens` scores by
    the mean over routing tokens, in all router layers, instead of the max.

    Raises:
      ConfigError: a retriever that scores only some documents.
    """
    need_scores(model.config.retriever, "ranking every document")
    graphdef, params = nnx.split(model)
    prompts = [renderer.prompt(question) for question in questions]
    template = _template(graphdef, params, np.asarray([renderer.prefix], np.int32))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        longest = max(len(prompts[i][0]) for i in some)
        shape = (batch_size, -(-longest // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE)
        tokens = np.full(shape, renderer.tokenizer.pad_id, np.int32)
        lengths, route = np.ones(batch_size, np.int32), np.zeros(shape, bool)
        for row, i in enumerate(some):
            ids, roles = prompts[i]
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
            route[row, : len(ids)] = np.asarray(roles) == ROUTING
        read = Route(bank, route, mean_over_tokens=mean_over_tokens, want=("scores",))
        scores = _scores(graphdef, params, tokens, lengths, template, read)
        yield from zip(some, np.asarray(scores).swapaxes(0, 1), strict=False)


def best_passages(scores: np.ndarray, passages: np.ndarray, count: int) -> list[list[int]]:
    """The best passages of each router layer, and last by the mean score of all layers, as router mode ranks.

    Args:
      scores: [L_r, N] of documents, which are blocks of passages.
      passages: [N] int, which passage each is a block of; a passage scores as its best block.
      count: passages listed at most.
    """
    lists = []
    for values in (*scores, scores.mean(0)):
        order = np.argsort(-values, kind="stable")
        _, firsts = np.unique(passages[order], return_index=True)
        lists.append(passages[order[np.sort(firsts)[:count]]].tolist())
    return lists


def fuse(rankings: Sequence[Sequence[int]], *, constant: float = 60.0) -> list[int]:
    """Reciprocal rank fusion (Cormack et al., 2009): by the sum of `1 / (constant + rank)`, ranks from 1."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (constant + rank)
    return sorted(scores, key=lambda item: (-scores[item], item))
