"""The four programs of a model as functions of shapes alone, spread over a mesh; nothing is allocated.

Sizes: B questions, T tokens of each, S cache slots, R rows, W row length, C chunks, N documents, L_r router layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from msa_jax.bank.encoder import _encode_rows
from msa_jax.config import TEMPLATE_LEN, MSAConfig
from msa_jax.context import Context, KeyValues, Reuse, Route
from msa_jax.data.batch import Batch, DocumentBatch, QuestionBatch
from msa_jax.memory import ContentSource, DocumentLayout, MemoryBank, StoredContent
from msa_jax.memory.selection import Selection
from msa_jax.model import MSATransformer
from msa_jax.plan.settings import Bank, Sizes
from msa_jax.sharding import DATA, MEMORY, MODEL, MeshConfig, Shardings
from msa_jax.training.config import OptimizerConfig, Phase, TrainingConfig
from msa_jax.training.optimizer import make_optimizer
from msa_jax.training.schedule import PhaseValues
from msa_jax.training.step import init_state, make_step

_WHOLE = P()
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Program:
    """A jit-compiled function and its arguments, `jax.ShapeDtypeStruct`s with shardings on one mesh."""

    name: str
    mesh: Mesh
    function: Any
    args: tuple

    def lower(self):
        with jax.set_mesh(self.mesh):
            return self.function.lower(*self.args)


def _array(mesh: Mesh, shape, dtype, spec: P = _WHOLE, kind: str | None = None) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.with_memory_kind(kind) if kind else sharding)


@functools.cache
def _split(config: MSAConfig, shardings: Shardings):
    model = nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0), shardings=shardings))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.as_pure(state)


def _placed(state, mesh: Mesh, shardings: Shardings):
    places = shardings.parameters(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)


def _parameters(config: MSAConfig, mesh: Mesh, shardings: Shardings):
    graphdef, state = _split(config, shardings)
    return graphdef, _placed(state, mesh, shardings)


def memory_bank(config: MSAConfig, mesh: Mesh, bank: Bank, sizes: Sizes, axes: tuple[str, ...]) -> MemoryBank:
    """A bank of shapes over the mesh axes `axes`."""
    ways, width = math.prod(mesh.shape[a] for a in axes), config.head_dim
    chunks, documents, heads = sizes.chunks(config, ways), sizes.documents(ways), config.num_kv_heads
    array = functools.partial(_array, mesh)
    layers = len(config.router_layers)
    of_documents = array((documents,), jnp.int32, P(axes))
    layout = DocumentLayout(
        array((chunks,), jnp.int32, P(axes)), of_documents, of_documents, max_length=sizes.longest(config), axes=axes
    )
    scale = array((layers, heads, chunks), jnp.float32, P(None, None, axes)) if bank.content == "int8" else None
    shape, content, stored = (layers, chunks, heads, width), None, None
    if bank.tier == "disk":
        stored = StoredContent(array((), jnp.int32), ContentSource(None, shape, bank.content))
    else:
        content = array(shape, bank.content, P(None, axes), "pinned_host" if bank.tier == "host" else None)
    return MemoryBank(
        array((layers, chunks, config.router_width), bank.keys, P(None, axes)), content, content, layout,
        key_scale=array((layers, chunks), jnp.float32, P(None, axes)) if bank.keys == "int8" else None,
        content_k_scale=scale, content_v_scale=scale, stored=stored,
    )  # fmt: skip


def _serving(config: MSAConfig) -> MSAConfig:
    return config.replace(dtype="bfloat16", param_dtype="bfloat16", remat="none")


def _cache(config, mesh, sizes, slots):
    shape = (config.num_layers, sizes.batch, slots, config.num_kv_heads, config.head_dim)
    one = _array(mesh, shape, jnp.bfloat16, P(None, DATA, None, MODEL))
    return KeyValues(one, one)


def question(config: MSAConfig, mesh: Mesh, bank: Bank, sizes: Sizes) -> Program:
    """A question's first pass: it routes in every router layer, reads what it selects, and gives a token."""
    config, shardings = _serving(config), Shardings.inference()
    graphdef, params = _parameters(config, mesh, shardings)
    one = (config.num_layers, 1, TEMPLATE_LEN, config.num_kv_heads, config.head_dim)
    prefix, number = _array(mesh, one, jnp.bfloat16, P(None, None, None, MODEL)), _array(mesh, (1,), jnp.int32)
    template = Context(KeyValues(prefix, prefix), number, number)

    def step(params, template, tokens, lengths, bank):
        model = nnx.merge(graphdef, params)
        output = model.prefill(tokens, lengths=lengths, template=template, read=Route(bank))
        token = jnp.argmax(model.logits(output.hidden[:, -1]), axis=-1).astype(jnp.int32)
        return token, output.own, output.selection

    tokens = _array(mesh, (sizes.batch, sizes.question_tokens), jnp.int32, P(DATA))
    args = (params, template, tokens, _array(mesh, (sizes.batch,), jnp.int32, P(DATA)))
    cache = jax.tree.map(lambda x: x.sharding, _cache(config, mesh, sizes, 1))
    out = (NamedSharding(mesh, P(DATA)), cache, NamedSharding(mesh, P(None, DATA)))
    return Program(
        "question", mesh, jax.jit(step, out_shardings=out, keep_unused=True),
        (*args, memory_bank(config, mesh, bank, sizes, shardings.bank)),
    )  # fmt: skip


def decode(config: MSAConfig, mesh: Mesh, bank: Bank, sizes: Sizes) -> Program:
    """One token more of every question, with the documents that it selected and a cache that is written in place."""
    config, shardings = _serving(config), Shardings.inference()
    graphdef, params = _parameters(config, mesh, shardings)

    def step(params, cache, token, length, position, selection, bank):
        model = nnx.merge(graphdef, params)
        hidden, context = model.decode(token, Context(cache, length, position), read=Reuse(bank, selection))
        return jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32), context.past

    b, layers, k = sizes.batch, len(config.router_layers), config.top_k_documents
    cache = _cache(config, mesh, sizes, sizes.cache_tokens)
    array = functools.partial(_array, mesh)
    ranges = array((layers, b, k), jnp.int32, P(None, DATA))
    scores = array((layers, b, k), jnp.float32, P(None, DATA))
    selection = Selection(documents=ranges, scores=scores, starts=ranges, lengths=ranges)
    args = (
        params, cache, *[array((b,), jnp.int32, P(DATA))] * 3, selection,
        memory_bank(config, mesh, bank, sizes, shardings.bank),
    )  # fmt: skip
    out = (NamedSharding(mesh, P(DATA)), jax.tree.map(lambda x: x.sharding, cache))
    return Program("decode", mesh, jax.jit(step, donate_argnums=1, out_shardings=out, keep_unused=True), args)


def encode(config: MSAConfig, mesh: Mesh, sizes: Sizes, rows: int) -> Program:
    """The step of `msa_jax.bank.encoder`, `rows` of a chip: each encodes its own, with all parameters."""
    config = _serving(config)
    shardings = Shardings()
    graphdef, params = _parameters(config, mesh, shardings)
    tokens = _array(mesh, (rows * mesh.size, sizes.row_tokens), jnp.int32, P(tuple(mesh.axis_names)))
    return Program("encode", mesh, _encode_rows, (graphdef, params, tokens, tokens, tokens))


# Tokens of a question that carry loss.
_TARGETS = 64


def train(config: MSAConfig, mesh: Mesh, sizes: Sizes, mesh_config: MeshConfig, *, remat: str = "full") -> Program:
    """The training step: parameters and AdamW's moments in float32 over all chips, layers recomputed going back."""
    config = config.replace(dtype="bfloat16", param_dtype="float32", remat=remat)
    shardings = Shardings.training(mesh_config)
    graphdef, params = _split(config, shardings)
    targets = min(_TARGETS, sizes.train_question_tokens)
    training = TrainingConfig(phases=(Phase(steps=1000),), optimizer=OptimizerConfig(), max_targets=targets)
    optimizer = make_optimizer(training)
    state = _placed(jax.eval_shape(lambda p: init_state(p, optimizer, training), params), mesh, shardings)
    ways = mesh.shape[DATA] * mesh.shape[MEMORY]
    up = lambda n: -(-n // ways) * ways  # noqa: E731
    rows, width = up(-(-sizes.train_tokens // sizes.train_row_tokens)), sizes.train_row_tokens
    documents = up(-(-sizes.train_tokens // min(sizes.document_tokens, width)))
    b, t = sizes.train_batch, sizes.train_question_tokens
    array = functools.partial(_array, mesh)
    in_rows = array((rows, width), jnp.int32, shardings.documents)
    ranges = array((documents,), jnp.int32, shardings.documents)
    asked = array((b, t), jnp.int32, shardings.questions)
    pairs = array((b, documents), jnp.bool_, shardings.pairs)
    batch = Batch(
        documents=DocumentBatch(
            tokens=in_rows, segment_ids=in_rows, positions=in_rows,
            chunk_documents=array((rows * width // config.chunk_size,), jnp.int32, shardings.documents),
            starts=ranges, lengths=ranges,
        ),
        questions=QuestionBatch(
            tokens=asked, roles=asked, mask=array((b, t), jnp.bool_, shardings.questions),
            loss_weights=array((b, t), jnp.float32, shardings.questions), visible=pairs, relevant=pairs,
        ),
    )  # fmt: skip
    scalar = array((), jnp.float32)
    phase = PhaseValues(lm_weight=scalar, aux_weight=scalar, mean_over_tokens=array((), jnp.bool_),
                        recent=array((), jnp.int32))
    prefix = tuple(range(1, 1 + TEMPLATE_LEN))
    return Program("train", mesh, make_step(graphdef, optimizer, training, prefix, state), (state, batch, phase))
