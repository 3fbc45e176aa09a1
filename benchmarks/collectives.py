"""What crosses devices in a training step: every collective of the compiled program, with its bytes.

    python -m benchmarks.collectives --mesh=2,2,2 --fsdp --documents=64

Compiles for CPU devices, without running anything. Other backends may fuse or split collectives; what has to cross
is the same.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.data.batch import Batch, DocumentBatch, QuestionBatch
from msa_jax.sharding import MeshConfig, Shardings
from msa_jax.training.config import Phase, TrainingConfig
from msa_jax.training.optimizer import make_optimizer
from msa_jax.training.schedule import phase_values
from msa_jax.training.step import init_state, make_step

_OPS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_INSTRUCTION = re.compile(rf"= (.*?) ({_OPS})(?:-start)?\(")
_ARRAY = re.compile(r"(pred|[a-z]+?(\d+)[a-z0-9]*)\[([\d,]*)\]")
# Three ways of writing them: lists of devices, a shape, or a mesh and some of its axes.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALL = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")


# Machine code, that is: nothing is run.
_UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Collective:
    """`op`, bytes of its result on one device, how often it runs in a step, and the operation that it serves."""

    op: str
    nbytes: int
    times: int
    source: str


def collectives(hlo: str) -> list[Collective]:
    """Those of a compiled program's text, in loops as often as they turn."""
    bodies: dict[str, list[str]] = {}
    name = entry = None
    for line in hlo.splitlines():
        if head := _HEAD.match(line.strip()):
            name = head[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)

    def walk(name: str, times: int) -> list[Collective]:
        found = []
        for line in bodies.get(name, ()):
            if match := _INSTRUCTION.search(line):
                if _group_size(line) == 1:
                    continue  # XLA keeps some that send nothing
                source = re.search(r'op_name="([^"]*)"', line)
                found.append(Collective(match[2], _bytes(match[1]), times, source[1] if source else ""))
            elif body := _WHILE.search(line):
                trips = _TRIPS.search(line)
                found += walk(body[1], times * int(trips[1] if trips else 1))
            elif called := _CALL.search(line):
                found += walk(called[1], times)
        return found

    return walk(entry, 1)


def _group_size(line: str) -> int | None:
    """How many devices take part; None where the line does not say."""
    if not (groups := _GROUPS.search(line)):
        return None
    listed, shape, mesh, axes = groups.groups()
    if mesh:
        sizes = dict(axis.split("=") for axis in mesh.split(","))
        return math.prod(int(sizes[axis]) for axis in axes.split(","))
    return int(shape) if shape else listed.count(",") + 1


def _bytes(shapes: str) -> int:
    total = 0
    for kind, bits, dims in _ARRAY.findall(shapes):
        size = 1
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size * (1 if kind == "pred" else int(bits) // 8)
    return total


def abstract_batch(
    documents: int, *, questions: int, tokens: int, rows: int, row_len: int, chunk_size: int, mesh, shardings
) -> Batch:
    """A batch of shapes alone, spread over a mesh."""

    def array(dtype, spec, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    def of(dtype, *shape):
        return array(dtype, shardings.documents, *shape)

    def asked(dtype):
        return array(dtype, shardings.questions, questions, tokens)

    chunks = rows * row_len // chunk_size
    packed, pairs = of(jnp.int32, rows, row_len), array(jnp.bool_, shardings.pairs, questions, documents)
    return Batch(
        DocumentBatch(packed, packed, packed, of(jnp.int32, chunks), *[of(jnp.int32, documents)] * 2),
        QuestionBatch(asked(jnp.int32), asked(jnp.int32), asked(jnp.bool_), asked(jnp.float32), pairs, pairs),
    )


def compile_step(config: MSAConfig, mesh_config: MeshConfig, documents: int, *, questions: int, tokens: int) -> str:
    """Text of the compiled training step of documents of one chunk-filled row each."""
    mesh, shardings = mesh_config.make(), Shardings.training(mesh_config)
    training = TrainingConfig(phases=(Phase(steps=1),), max_targets=8)
    optimizer = make_optimizer(training)
    make = lambda: MSATransformer(config, rngs=nnx.Rngs(0), shardings=shardings)  # noqa: E731
    graphdef, params = nnx.split(nnx.eval_shape(make))
    state = jax.eval_shape(lambda p: init_state(p, optimizer, training), nnx.as_pure(params))
    places = shardings.parameters(state, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
    batch = abstract_batch(
        documents, questions=questions, tokens=tokens, rows=documents, row_len=4 * config.chunk_size,
        chunk_size=config.chunk_size, mesh=mesh, shardings=shardings,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        step = make_step(graphdef, optimizer, training, (5, 6, 7), state)
        return step.lower(state, batch, phase_values(training.phases[0])).compile(_UNOPTIMISED).as_text()


def compile_encode(config: MSAConfig, mesh_config: MeshConfig, documents: int) -> str:
    """Text of the compiled encoding of documents, spread as in training."""
    mesh, shardings = mesh_config.make(), Shardings.training(mesh_config)
    make = lambda: MSATransformer(config, rngs=nnx.Rngs(0), shardings=shardings)  # noqa: E731
    graphdef, params = nnx.split(nnx.eval_shape(make))
    params = nnx.as_pure(params)
    places = shardings.parameters(params, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, places)
    rows = jax.ShapeDtypeStruct(
        (documents, 4 * config.chunk_size), jnp.int32, sharding=jax.NamedSharding(mesh, shardings.documents)
    )

    def encode(params, tokens, segment_ids, positions):
        model = nnx.merge(graphdef, params)
        return model.encode_documents(tokens, segment_ids=segment_ids, positions=positions).states

    with jax.set_mesh(mesh):
        out = jax.NamedSharding(mesh, jax.P(None, *shardings.documents))
        return jax.jit(encode, out_shardings=out).lower(params, rows, rows, rows).compile(_UNOPTIMISED).as_text()


def small_config(**changes) -> MSAConfig:
    return MSAConfig(**(dict(
        vocab_size=96, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48,
        chunk_size=4, top_k_documents=3, router_layers=(2, 3), router_bias=True,
    ) | changes))  # fmt: skip


def main(_):
    data, memory, model = map(int, _MESH.value)
    mesh = MeshConfig(data=data, memory=memory, model=model, fsdp=_FSDP.value)
    config = small_config() if _PRESET.value == "small" else MSAConfig.preset(_PRESET.value)
    found = collectives(
        compile_step(config, mesh, _DOCUMENTS.value, questions=_QUESTIONS.value, tokens=_TOKENS.value)
    )
    table = collections.Counter()
    count = collections.Counter()
    for c in found:
        where = re.sub(r"jit\([^)]*\)/|while/body/|closed_call/|checkpoint/|rematted_computation/", "", c.source)
        table[c.op, where] += c.nbytes * c.times
        count[c.op, where] += c.times
    for (op, where), nbytes in table.most_common(_SHOW.value):
        print(f"{nbytes:>12,} B {count[op, where]:>5} x {op:<20} {where}")
    encoding = collectives(compile_encode(config, mesh, _DOCUMENTS.value))
    print(f"{sum(table.values()):>12,} B in all; encoding documents: {len(encoding)} collectives")


if __name__ == "__main__":
    _MESH = flags.DEFINE_list("mesh", ["2", "2", "2"], "Sizes of data, memory, model.")
    _FSDP = flags.DEFINE_bool("fsdp", False, "Spread parameters too.")
    _PRESET = flags.DEFINE_string("preset", "small", "Model: small, or a preset.")
    _DOCUMENTS = flags.DEFINE_integer("documents", 64, "N.")
    _QUESTIONS = flags.DEFINE_integer("questions", 8, "B.")
    _TOKENS = flags.DEFINE_integer("tokens", 16, "T.")
    _SHOW = flags.DEFINE_integer("show", 30, "Lines of the table.")
    app.run(main)
