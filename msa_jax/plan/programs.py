"""The four programs of a model as functions of shapes alone, spread over a mesh; nothing is allocated.

They are the programs that run: the steps of the engine, of the encoder of banks and of training.

Sizes: B questions, T tokens of each, S cache slots, R rows, W row length, C chunks, N documents, L_r router layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from msa_jax.bank.encoder import _encode_rows
from msa_jax.config import TEMPLATE_LEN, MSAConfig
from msa_jax.context import Context, KeyValues
from msa_jax.data.batch import Batch, DocumentBatch, QuestionBatch
from msa_jax.inference.batching import decode_batch, no_prefill
from msa_jax.inference.candidates import candidates_of
from msa_jax.inference.corpus import View
from msa_jax.inference.programs import decode as decode_step
from msa_jax.inference.programs import prefill
from msa_jax.inference.settings import EngineConfig, Sampling
from msa_jax.inference.slots import Visibility, empty_slots, places
from msa_jax.memory import ContentSource, DocumentLayout, MemoryBank, StoredContent
from msa_jax.model import MSATransformer
from msa_jax.plan.settings import Bank, Sizes
from msa_jax.sharding import DATA, MEMORY, MODEL, MeshConfig, Shardings
from msa_jax.training.config import OptimizerConfig, Phase, TrainingConfig
from msa_jax.training.optimizer import make_optimizer
from msa_jax.training.schedule import PhaseValues
from msa_jax.training.step import init_state, make_step

_WHOLE = P()
_ENGINE = EngineConfig()
# Of the engine's inputs whose size hardly matters: namespaces of a bank, tokens of a document's number.
_NAMESPACES, _DIGITS = 64, 8
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Program:
    """A jit-compiled function, its static options, and its arguments: shapes with shardings on one mesh."""

    name: str
    mesh: Mesh
    function: Any
    args: tuple
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def lower(self):
        with jax.set_mesh(self.mesh):
            return self.function.lower(*self.args, **self.options)


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


def _asking(config, mesh, bank, sizes):
    """What both steps of asking are given: parameters, the template, the engine's slots, the bank."""
    config, shardings = _serving(config), Shardings.inference()
    graphdef, params = _parameters(config, mesh, shardings)
    shape = (config.num_layers, 1, TEMPLATE_LEN, config.num_kv_heads, config.head_dim)
    one, number = _array(mesh, shape, jnp.bfloat16, P(None, None, None, MODEL)), _array(mesh, (1,), jnp.int32)
    template = Context(KeyValues(one, one), number, number)
    memory = memory_bank(config, mesh, bank, sizes, shardings.bank)

    def empty(params, template, memory):
        model = nnx.merge(graphdef, params)
        return empty_slots(model, template, memory, count=sizes.batch, size=sizes.cache_tokens)

    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, template, memory))
    slots = jax.eval_shape(empty, *bare)
    slots = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), slots, places(slots, mesh))
    return graphdef, params, template, slots, memory


def _batch(mesh, arrays):
    """Shapes of what the host gives a step."""
    return jax.tree.map(lambda x: _array(mesh, x.shape, x.dtype), arrays)


def question(config: MSAConfig, mesh: Mesh, bank: Bank, sizes: Sizes) -> Program:
    """The engine's first pass of questions: they route in every router layer, read what they select, get a token."""
    graphdef, params, template, slots, memory = _asking(config, mesh, bank, sizes)
    documents = _array(mesh, (memory.num_documents,), jnp.int32)
    batch = no_prefill(
        View(np.zeros(_NAMESPACES, bool)), size=sizes.batch, length=sizes.question_tokens, head=TEMPLATE_LEN, nobody=0
    )
    args = (graphdef, params, template, slots, memory, Visibility(documents, documents), _batch(mesh, batch))
    options = dict(fresh=True, routes=True, reported=_ENGINE.reported_documents)
    return Program("question", mesh, prefill, args, options)


def decode(config: MSAConfig, mesh: Mesh, bank: Bank, sizes: Sizes) -> Program:
    """The engine's decoding: tokens of every question, with the documents that it selected, in a cache of all."""
    graphdef, params, _, slots, memory = _asking(config, mesh, bank, sizes)
    most = _ENGINE.reported_documents * len(config.router_layers)
    batch = decode_batch(
        [None] * sizes.batch, sampling=[Sampling()] * sizes.batch, head=TEMPLATE_LEN,
        candidates=functools.partial(candidates_of, opening=0, shape=(most, _DIGITS)),
    )  # fmt: skip
    options = dict(columns=sizes.cache_tokens, steps=_ENGINE.decode_steps, stop_tokens=(0,))
    return Program("decode", mesh, decode_step, (graphdef, params, slots, memory, _batch(mesh, batch)), options)


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
