"""A start at which the router ranks documents by the rare words that they share with the whole question.

Routing scores a document by its best chunk for the best of the question's tokens (arXiv 2603.23516, section 3.2), and
one token of a question is one word. Here the question's last token begins as the sum of all its words, each with its
inverse document frequency (Spärck Jones, 1972) as weight, and a chunk's key as that of its own: the cosine of two bags
of words, whose vectors are random. Parameters only, the architecture is untouched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.config import MSAConfig
from msa_jax.data import Renderer, Tokenizer
from msa_jax.data.batch import ROUTING
from msa_jax.layers.attention import SelfAttention
from msa_jax.model import MSATransformer
from msa_jax.training.init import undoing

_LEAST = 0.01
_TEXTS_AT_ONCE = 1000
# Columns of the embedding that words, special tokens and the token at a question's end have to themselves.
_WORD, _FRAME, _END, _COLUMNS = 0, 1, 2, 3
# Attention logits in favour of special tokens, and how much of what was attended to is added to a token.
_LOGIT, _SCALE = 10.0, 8.0


def rarity(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> np.ndarray:
    """[V] float32 weights of `size` tokens in 0.01..1: log of the inverse share of texts that hold them.

    1 for what no text holds; 0 for special tokens, which frames and numbers are made of.
    """
    held, count = np.zeros(size, np.int64), 0
    for some in itertools.batched(texts, _TEXTS_AT_ONCE):
        count += len(some)
        for ids in tokenizer.encode_batch(some):
            held[np.unique(np.asarray(ids, np.int64))] += 1
    weights = np.log((count + 1) / (held + 1)) / np.log(count + 1)
    weights = np.maximum(weights, _LEAST)
    weights[[tokenizer.token_id(token) for token in tokenizer.template.special_tokens]] = 0.0
    return weights.astype(np.float32)


def last_routing_token(tokenizer: Tokenizer) -> int:
    """Id of the token that the frame of every question ends with."""
    ids, roles = Renderer(tokenizer).prompt("")
    return max((i, token) for i, (token, role) in enumerate(zip(ids, roles, strict=True)) if role == ROUTING)[1]


def _embeddings(table: jax.Array, weights: np.ndarray, end: int, std: float) -> jax.Array:
    """Weighted words, each kind of token beside a constant of its own, as large as the rarest word."""
    kinds = np.zeros((len(weights), _COLUMNS), np.float32)
    kinds[np.arange(len(weights)), np.where(weights > 0, _WORD, _FRAME)] = 1.0
    kinds[end] = np.eye(_COLUMNS)[_END]
    words = weights * (np.arange(len(weights)) != end)
    kinds = jnp.asarray(kinds * std * table.shape[1] ** 0.5, table.dtype)
    return (table * words[:, None].astype(table.dtype)).at[:, :_COLUMNS].set(kinds)


def _gather(attention: SelfAttention, config: MSAConfig, *, rngs: nnx.Rngs) -> None:
    """Let the first of stacked layers add the mean of all words so far to the end of a question, and nothing else.

    All other tokens attend to special tokens, which have no value. The scale is on the values: on the output
    projection, the first steps of training would turn into a large offset of every token.
    """
    c, dtype = config, config.storage_dtype
    make, words = nnx.initializers.orthogonal(), c.hidden_size - _COLUMNS
    # Of a head, the dimension that RoPE turns slowest says what is a special token.
    slowest = c.head_dim // 2 - 1
    query = np.zeros((c.hidden_size, c.num_heads, c.head_dim), np.float32)
    query[:_COLUMNS, :, slowest] = np.asarray([1.0, 1.0, -1.0])[:, None]
    key = make(rngs.params(), (words, c.router_width), jnp.float32).reshape(words, c.num_kv_heads, c.head_dim)
    key = jnp.pad(key.at[..., slowest].set(0.0), ((_COLUMNS, 0), (0, 0), (0, 0))).at[_FRAME, :, slowest].set(1.0)
    value = jnp.pad(make(rngs.params(), (words, c.router_width), jnp.float32), ((_COLUMNS, 0), (0, 0)))
    flat = lambda x: x.reshape(c.hidden_size, -1)  # noqa: E731
    for projection, kernel in (
        (attention.q_proj, flat(query)), (attention.k_proj, flat(key)), (attention.v_proj, _SCALE * value),
        (attention.o_proj, undoing(value, c)),
    ):  # fmt: skip
        projection.kernel[...] = projection.kernel[...].at[0].set(jnp.asarray(kernel, dtype))
    attention.q_norm.scale[...] = attention.q_norm.scale[...].at[0].set(_LOGIT * c.head_dim**-0.5)


def _match(attention: SelfAttention, config: MSAConfig, count: int, *, rngs: nnx.Rngs) -> None:
    """Routing keys hold words apart; queries do too, and score less where a word stands alone.

    A query's constant goes to one dimension of each head that words in keys do not use. Special tokens have a little
    there, with the other sign: a chunk of nothing else would have a key of zero, whose gradient is without measure.
    W_KR is large because its first steps turn the constant of all words, which the mean over a chunk keeps, into a
    part that all keys share; in a trial with 1 it drowned the words within 100 steps of Muon at 0.002.
    """
    c, dtype = config, config.storage_dtype
    make, shape = nnx.initializers.orthogonal(), (c.hidden_size - _COLUMNS, c.num_kv_heads * (c.head_dim - 1))
    kernel = jnp.stack([make(key, shape, jnp.float32) for key in jax.random.split(rngs.params(), count)])
    kernel = kernel.reshape(count, shape[0], c.num_kv_heads, c.head_dim - 1)
    keys = jnp.pad(kernel, ((0, 0), (_COLUMNS, 0), (0, 0), (0, 1)))
    queries = jnp.repeat(keys.at[:, _WORD, :, -1].set(1.0), c.group_size, axis=2)
    keys = _SCALE * keys.at[:, _FRAME, :, -1].set(-0.01)
    attention.router_k_proj.kernel[...] = keys.reshape(count, c.hidden_size, -1).astype(dtype)
    attention.router_q_proj.kernel[...] = queries.reshape(count, c.hidden_size, -1).astype(dtype)


def bag_of_words(
    model: MSATransformer, weights: np.ndarray, end: int, *, embedding_std: float, rngs: nnx.Rngs
) -> None:
    """Start as a bag of words, in place, on top of `embedding_stream`.

    Every embedding is its word times its weight beside a constant, so that the norm before a layer keeps how rare it
    is. Layer 0 gives the token at the end of a question the mean of all words before it. Router layers match words.

    Args:
      weights: [V] float32, see `rarity`.
      end: id of the token that ends a question's frame, see `last_routing_token`.
      embedding_std: of the rarest words' embeddings.
    """
    model.embed.embedding[...] = _embeddings(model.embed.embedding[...], weights, end, embedding_std)
    _gather(model.groups[0].attention, model.config, rngs=rngs)
    for (is_router, _, count), group in zip(model.config.layer_groups, model.groups, strict=True):
        if is_router:
            _match(group.attention, model.config, count, rngs=rngs)
