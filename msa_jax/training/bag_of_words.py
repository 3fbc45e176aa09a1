"""A start at which the router ranks documents by the rare words that they share with the whole question.

Routing scores a document by its best chunk for the best of the question's tokens (arXiv 2603.23516, section 3.2), and
one token of a question is one word. Here the question's last token begins as the sum of all its words, each with a
weight that grows with its rarity, and a chunk's key as that of its own: the cosine of two bags of words, whose vectors
are random. Parameters only, the architecture is untouched.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.config import ConfigError, MSAConfig
from msa_jax.data import Renderer, Tokenizer
from msa_jax.data.batch import ROUTING
from msa_jax.model import MSATransformer

_BYTES = 256
# Tokens of a byte-level BPE come by how often they are merged. Weights log(1 + rank / 40) found as many passages of
# held-out questions as inverse document frequencies did, within 0.03, and need no counting.
_COMMON = 40.0
_LEAST = 0.05
# Of the usual token in units of the rarest one's words: with both alike the norm keeps weights nearly in proportion.
_CONSTANT = 1.0
_SHARPNESS = 0.1


def rarity(tokenizer: Tokenizer, size: int) -> np.ndarray:
    """[V] float32 weights of `size` tokens in 0..1, by their rank in a byte-level BPE vocabulary.

    0.05 or less for bytes; 0 for special tokens, which frames and numbers are made of.
    """
    special = np.zeros(size, bool)
    special[[tokenizer.token_id(token) for token in tokenizer.template.special_tokens]] = True
    rank = np.cumsum(~special) - 1 - _BYTES
    weights = np.maximum(np.log1p(np.maximum(rank, 0) / _COMMON), _LEAST)
    return np.where(special, 0.0, weights / weights.max()).astype(np.float32)


def last_routing_token(tokenizer: Tokenizer) -> int:
    """Id of the token that the frame of every question ends with."""
    ids, roles = Renderer(tokenizer).prompt("")
    return max((i, token) for i, (token, role) in enumerate(zip(ids, roles, strict=True)) if role == ROUTING)[1]


def check(config: MSAConfig) -> None:
    """Raises ConfigError if the model has no layer below its first router layer, where words could be summed."""
    if config.router_layers[0] == 0:
        raise ConfigError(
            "training.bag_of_words sums a question's words in the layer below the first router layer, and "
            f"model.router_layers {config.router_layers} begin with layer 0; begin with 1, or leave the start out."
        )


def _embeddings(table: jax.Array, weights: np.ndarray, last: int, std: float) -> jax.Array:
    """Words weighted beside a constant (column 0) of the same size; the last token has neither."""
    table = table * weights[:, None].astype(table.dtype)
    constant = _CONSTANT * std * table.shape[1] ** 0.5
    # Not all zeros: the norm's gradient there is without measure.
    return table.at[:, 0].set(constant).at[last].set(0.0).at[last, 0].set(0.02 * constant)


def bag_of_words(
    model: MSATransformer, weights: np.ndarray, last: int, *, embedding_std: float, rngs: nnx.Rngs
) -> None:
    """Start as a bag of words, in place, on top of `embedding_stream`.

    Every token's embedding is its word times its weight beside a constant, so that the norm before a layer keeps
    how rare it is. Layer 0 attends evenly and adds the mean of all words so far, which is nearly all that the last
    token of a question has. In router layers W_KR keeps words apart and leaves the constant out; W_QR is W_KR, and takes
    the constant to one dimension of each head that no key uses: it lowers the scores of single words.

    Args:
      weights: [V] float32, see `rarity`.
      last: id of the token that ends a question's frame, see `last_routing_token`.
      embedding_std: of the rarest words' embeddings.
    """
    c = model.config
    orthogonal = nnx.initializers.orthogonal()
    model.embed.embedding[...] = _embeddings(model.embed.embedding[...], weights, last, embedding_std)

    lowest = model.groups[0].attention
    shape = (c.hidden_size - 1, c.router_width)
    value = jnp.pad(orthogonal(rngs.params(), shape, jnp.float32), ((1, 0), (0, 0)))
    heads = value.reshape(c.hidden_size, c.num_kv_heads, 1, c.head_dim)
    heads = jnp.broadcast_to(heads, (*heads.shape[:2], c.group_size, c.head_dim)) / c.group_size
    dtype = c.storage_dtype
    lowest.v_proj.kernel[...] = lowest.v_proj.kernel[...].at[0].set(value.astype(dtype))
    lowest.o_proj.kernel[...] = lowest.o_proj.kernel[...].at[0].set(heads.reshape(c.hidden_size, -1).T.astype(dtype))
    lowest.q_norm.scale[...] = lowest.q_norm.scale[...].at[0].set(_SHARPNESS)

    for (is_router, _, count), group in zip(c.layer_groups, model.groups, strict=True):
        if not is_router:
            continue
        words = (c.hidden_size - 1, c.num_kv_heads * (c.head_dim - 1))
        kernel = jnp.stack([orthogonal(key, words, jnp.float32) for key in jax.random.split(rngs.params(), count)])
        kernel = kernel.reshape(count, c.hidden_size - 1, c.num_kv_heads, c.head_dim - 1)
        keys = jnp.pad(kernel, ((0, 0), (1, 0), (0, 0), (0, 1)))
        queries = jnp.repeat(keys.at[:, 0, :, -1].set(1.0), c.group_size, axis=2)
        attention = group.attention
        attention.router_k_proj.kernel[...] = keys.reshape(count, c.hidden_size, -1).astype(dtype)
        attention.router_q_proj.kernel[...] = queries.reshape(count, c.hidden_size, -1).astype(dtype)
