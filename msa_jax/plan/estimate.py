"""Temporaries of a program by arithmetic: for GPUs, and to try on TPUs what is likely to fit. GiB of one chip.

Each counts the few largest arrays that live at once; the compiler's word counts where there is one (docs/plan.md
compares the two).
"""

from __future__ import annotations

import math

from msa_jax.config import MSAConfig
from msa_jax.plan.settings import Sizes
from msa_jax.sharding import MeshConfig

GIB = 2**30


def parameters(config: MSAConfig) -> int:
    """Number of parameters of a model."""
    c = config
    heads, width = c.num_heads * c.head_dim, c.router_width
    layer = 2 * c.hidden_size * (heads + width) + 3 * c.hidden_size * c.mlp_size + 2 * c.hidden_size
    specs = [c.spec_of(i) for i in range(c.num_layers)]
    biases = sum(s.qkv_bias * (heads + 2 * width) + s.o_bias * c.hidden_size for s in specs)
    biases += sum(s.mlp_bias * (2 * c.mlp_size + c.hidden_size) for s in specs)
    norms = sum(2 * c.head_dim * s.qk_norm + 2 * c.hidden_size * s.post_norms for s in specs)
    router = c.hidden_size * (heads + width) + c.num_heads * c.router_bias
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.hidden_size
    return c.num_layers * layer + norms + biases + len(c.router_layers) * router + tables + c.hidden_size


def question(config: MSAConfig, mesh: MeshConfig, sizes: Sizes) -> float:
    """Scores of all chunks and documents in two layouts, new keys and values, a layer's activations, logits."""
    ways, batch = mesh.memory * mesh.model, sizes.batch / mesh.data
    scores = 2 * 4 * batch * (sizes.chunks(config, ways) + sizes.documents(ways)) / ways
    own = 2 * 2 * config.num_layers * batch * sizes.question_tokens * config.router_width / mesh.model
    layer = _activations(config, mesh, batch * sizes.question_tokens)
    return (scores + own + layer + _logits(config, mesh, batch)) / GIB


def decode(config: MSAConfig, mesh: MeshConfig, sizes: Sizes) -> float:
    """A copy of the cache, activations and logits of one token."""
    batch = sizes.batch / mesh.data
    cache = 2 * 2 * config.num_layers * batch * sizes.cache_tokens * config.router_width / mesh.model
    return (cache + _activations(config, mesh, batch) + _logits(config, mesh, batch)) / GIB


def encode(config: MSAConfig, sizes: Sizes, rows: int) -> float:
    """A layer: the logits of attention within `rows` rows of a chip, dense, and the inner units of the MLP."""
    alone = MeshConfig(data=1)
    layer = _dense_attention(config, rows, sizes.row_tokens) + _activations(config, alone, rows * sizes.row_tokens)
    return layer / GIB


def train(config: MSAConfig, mesh: MeshConfig, sizes: Sizes) -> float:
    """Gradients, the inputs of all layers, one layer and its gradient going back, parameters gathered in bfloat16.

    All layers' parameters: what is compiled takes more than one layer at a time explains.
    """
    ways = mesh.data * mesh.memory
    rows = math.ceil(sizes.train_tokens / sizes.train_row_tokens / ways)
    documents, asked = rows * sizes.train_row_tokens, sizes.train_batch * sizes.train_question_tokens / mesh.data
    table = config.vocab_size * config.hidden_size / mesh.model
    layer = (parameters(config) - table * mesh.model) / config.num_layers / mesh.model
    saved = 2 * config.num_layers * config.hidden_size * (documents + asked)
    states = 2 * 3 * 4 * len(config.router_layers) * documents / config.chunk_size * config.router_width
    gradients = 4 * parameters(config) / (ways * mesh.model if mesh.fsdp else mesh.model)
    attention = _dense_attention(config, rows, sizes.train_row_tokens) / mesh.model
    going_back = 2 * attention + 3 * _activations(config, mesh, documents)
    gathered = (2 + 4) * (table + layer) + 2 * parameters(config) / mesh.model
    return (gradients + saved + states + going_back + gathered) / GIB


def _dense_attention(config, rows, width):
    """Logits in float32, their softmax, and it in bfloat16."""
    return rows * config.num_heads * width**2 * (4 + 4 + 2)


def _activations(config, mesh, tokens):
    """Of one layer, in bfloat16: the residual stream and its norm, q, k, v and output, the MLP's inner units."""
    spread = config.num_heads * config.head_dim * 2 + config.router_width * 2 + 3 * config.mlp_size
    return 2 * tokens * (4 * config.hidden_size + spread / mesh.model)


def _logits(config, mesh, batch):
    return 4 * batch * config.vocab_size / mesh.model
