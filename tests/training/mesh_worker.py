"""Run by test_sharding.py with 8 devices: forward, losses and gradients of training on meshes against one device's.

Prints a line of JSON for each mesh named as `data,memory,model,fsdp`.
"""

import json
import sys
import types

import jax
import numpy as np
from flax import nnx

from msa_jax.data import LossWeights
from msa_jax.data.batch import Batch, QuestionBatch, pack_parts
from msa_jax.errors import DataError
from msa_jax.runs.build import make_model
from msa_jax.runs.config import DataConfig, EvalConfig, RunConfig, TokenizerConfig
from msa_jax.sharding import MeshConfig, Shardings
from msa_jax.training.config import OptimizerConfig, Phase, TrainingConfig
from msa_jax.training.optimizer import make_optimizer
from msa_jax.training.schedule import phase_values
from msa_jax.training.step import forward, init_state, loss_of, spread_batch

N, B, T, VOCABULARY = 16, 8, 7, 48
MODEL = dict(
    preset="tiny", hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=24, chunk_size=4,
    top_k_documents=3, router_layers=(1,), router_bias=True, router_bias_init=2.0, remat="none",
    proportional_attention=True,
)  # fmt: skip
TRAINING = TrainingConfig(
    phases=(Phase(steps=1, aux_weight=0.7),), max_targets=5, tied_router=True,
    optimizer=OptimizerConfig(name="muon", ema_decay=0.5),
)  # fmt: skip


def batch(parts):
    rng = np.random.default_rng(3)
    documents = [rng.integers(1, VOCABULARY, size=rng.integers(1, 9)) for _ in range(N)]
    mask = np.arange(T) < rng.integers(4, T + 1, size=(B, 1))
    roles = np.where(np.arange(T) < 3, 0, -1).astype(np.int32) * np.ones((B, 1), np.int32)
    asked = QuestionBatch(
        tokens=rng.integers(1, VOCABULARY, size=(B, T)).astype(np.int32),
        roles=roles,
        mask=mask,
        loss_weights=(mask & (roles < 0)).astype(np.float32),
        visible=rng.random((B, N)) < 0.7,
        relevant=rng.random((B, N)) < 0.2,
    )
    # Rows of 12 tokens, 3 chunks: a document of up to 8 tokens has 2.
    return Batch(pack_parts(documents, parts, chunk_size=4, row_len=12, num_rows=16), asked)


def computed(mesh_config, mesh):
    """Loss, metrics, selection and gradients; and the state at the start of a run."""
    run = RunConfig(
        model=MODEL, data=DataConfig(loss_weights=LossWeights()), tokenizer=TokenizerConfig(), training=TRAINING,
        evaluation=EvalConfig(), mesh=mesh_config,
    )  # fmt: skip
    model = make_model(run, types.SimpleNamespace(vocab_size=VOCABULARY), mesh)
    if mesh is None:
        # Drawn without a mesh, the rest is one device's too.
        model.shardings = Shardings()
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    phase = phase_values(TRAINING.phases[0])

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        output = forward(model, batch, (5, 6, 7))
        loss, metrics = loss_of(model, batch, output, phase, TRAINING)
        # Of all hidden states too, not of targets alone.
        return loss + jax.numpy.mean(jax.numpy.sin(3 * output.hidden)), (metrics, output.selection, output.hidden)

    whole = batch(mesh.shape["data"] * mesh.shape["memory"] if mesh else 1)
    with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
        placed = spread_batch(whole, mesh, model.shardings) if mesh else whole
        (value, aux), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, placed)
        found = jax.device_get((value, *aux, gradients, params))
        state = init_state(params, make_optimizer(TRAINING), TRAINING, mesh, model.shardings)
    return found, state


def largest(got, want):
    """Largest difference of any array, relative to the largest value of that array."""
    error = lambda a, b: float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-6))  # noqa: E731
    return max(jax.tree.leaves(jax.tree.map(error, got, want)))


def compare(got, want, state):
    loss, metrics, selection, hidden, gradients, params = got
    order = lambda s: np.sort(np.where(s.lengths > 0, s.documents, N), axis=-1)  # noqa: E731
    leaves = jax.tree.leaves(state.params)
    # Every array that an optimiser or the average keeps of a parameter lies as that parameter does.
    kept = jax.tree_util.tree_leaves_with_path((state.opt_state, state.ema))
    places = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(state.params)}
    follow = [
        x.sharding.spec == places[name].sharding.spec
        for path, x in kept for name in places if jax.tree_util.keystr(path).endswith(name)
    ]  # fmt: skip
    return {
        "loss": float(abs(loss - want[0])),
        "metrics": largest(metrics, want[1]),
        "same_documents": bool((order(selection) == order(want[2])).all()),
        "hidden": largest(hidden, want[3]),
        "gradients": largest(gradients, want[4]),
        "start": largest(params, want[5]),
        "largest_part": max(x.addressable_data(0).size / x.size for x in leaves if x.ndim > 2 or x.shape[0] > 40),
        "optimizer_follows": len(follow) if all(follow) else 0,
    }


def main():
    want, _ = computed(MeshConfig(), None)
    for text in sys.argv[1:]:
        data, memory, model, fsdp = map(int, text.split(","))
        config = MeshConfig(data=data, memory=memory, model=model, fsdp=bool(fsdp))
        got, state = computed(config, config.make())
        print(json.dumps({"mesh": text} | compare(got, want, state)), flush=True)
    try:
        batch(3)
    except DataError as error:
        print(json.dumps({"refused": str(error)}))


if __name__ == "__main__":
    main()
