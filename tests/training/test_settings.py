"""Settings, schedule, optimiser and starts of training."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.errors import ConfigError
from msa_jax.runs.config import RunConfig
from msa_jax.training.config import OptimizerConfig, Phase, TrainingConfig
from msa_jax.training.init import copy_circuit, embedding_stream, tie_router
from msa_jax.training.optimizer import make_optimizer
from msa_jax.training.schedule import lr_factor, phase_at

PLAIN = dict(warmup_steps=0, decay="constant", clip_norm=1e9)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("training", "aux_loss"), "hinge", "aux_loss must be one of"),
        (("training", "phases"), [], "at least one step"),
        (("training", "temperature"), 0.0, "temperature must be positive"),
        (("training", "optimizer"), {"name": "sgd"}, "optimizer.name must be one of"),
        (("training", "optimizer"), {"rate": 1}, "rate"),
        (("training", "optimizer"), {"accumulate": 0}, "accumulate must be at least 1"),
        (("training", "epochs"), 3, "epochs"),
        (("data", "source"), "web", "data.source must be"),
        (("data", "num_documents"), 0, "data.num_documents must be at least 1"),
        (("model", "num_heads"), 3, "multiple of num_kv_heads"),
        (("model", "widht"), 3, "widht"),
        (("model", "preset"), "huge", "Unknown preset"),
        (("tokenizer", "template"), "long", "tokenizer.template must be"),
        (("tokenizer", "numbers"), "roman", "tokenizer.numbers must be"),
        (("optimiser",), {}, "optimiser"),
    ],
)
def test_bad_settings_are_named(settings, path, value, message):
    values = copy.deepcopy(settings)
    values["model"] |= {"num_kv_heads": 2, "num_heads": 2}
    target = values
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)


def test_phases_follow_each_other():
    phases = (Phase(steps=3, lm_weight=0.1), Phase(steps=2, lm_weight=1.0))
    assert [phase_at(phases, s).lm_weight for s in range(7)] == [0.1] * 3 + [1.0] * 4


def test_learning_rate_warms_up_decays_and_follows_the_phase():
    training = TrainingConfig(
        phases=(Phase(steps=10), Phase(steps=30, lr_scale=0.06)),
        optimizer=OptimizerConfig(warmup_steps=4, decay="linear", final_fraction=0.0),
    )
    factor = lr_factor(training)
    got = [float(factor(s)) for s in (0, 3, 9, 10, 39)]
    want = [0.25, 1.0, 1 - 5 / 36, 0.06 * (1 - 6 / 36), 0.06 * (1 - 35 / 36)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def make(**changes):
    config = MSAConfig.preset("tiny", **({"vocab_size": 64} | changes))
    return MSATransformer(config, rngs=nnx.Rngs(3))


def test_muon_takes_matrices_and_adam_the_rest():
    """A Muon update of a matrix has singular values near one; Adam's first update has one size throughout."""
    training = TrainingConfig(
        phases=(Phase(steps=10),),
        optimizer=OptimizerConfig(name="muon", learning_rate=1.0, adam_learning_rate=1.0, **PLAIN),
    )
    params = nnx.as_pure(nnx.state(make(tie_embeddings=False)))
    keys = iter(jax.random.split(jax.random.key(0), 100))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    optimizer = make_optimizer(training)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith("kernel") and not name.startswith("lm_head"):
            for matrix in np.asarray(update):
                singular = np.linalg.svd(matrix, compute_uv=False)
                assert singular.max() < 1.8 and np.quantile(singular, 0.1) > 0.5, name
        else:
            size = np.abs(update)
            assert size.min() > 0.5 and np.ptp(size) < 0.01 * size.mean(), name


def test_accumulation_averages_gradients():
    settings = dict(name="adamw", learning_rate=0.1, **PLAIN)
    phases = (Phase(steps=9),)
    params = {"w": jnp.asarray([1.0, -2.0, 3.0])}
    first, second = {"w": jnp.asarray([0.5, -1.0, 2.0])}, {"w": jnp.asarray([1.5, 3.0, -1.0])}
    one = make_optimizer(TrainingConfig(phases=phases, optimizer=OptimizerConfig(**settings)))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    updates, _ = one.update(mean, one.init(params), params)
    want = optax.apply_updates(params, updates)
    two = make_optimizer(TrainingConfig(phases=phases, optimizer=OptimizerConfig(**settings, accumulate=2)))
    state, got = two.init(params), params
    for grads in (first, second):
        updates, state = two.update(grads, state, got)
        got = optax.apply_updates(got, updates)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)
    assert not np.allclose(got["w"], params["w"])


def test_tied_router_repeats_its_keys_projection():
    model = make()
    tie_router(model)
    attention = model.groups[1].attention
    kernel_q = np.asarray(attention.router_q_proj.kernel[...]).reshape(2, 128, 4, 64)
    kernel_k = np.asarray(attention.router_k_proj.kernel[...]).reshape(2, 128, 2, 64)
    for h in range(4):
        np.testing.assert_array_equal(kernel_q[:, :, h], kernel_k[:, :, h // 2])


def test_copy_circuit_copies_what_is_attended():
    """With every head on one token, value and output projections together are `scale` times the identity."""
    model = make()
    copy_circuit(model, 0.5, rngs=nnx.Rngs(1))
    attention = model.groups[1].attention
    for layer in range(2):
        value = np.asarray(attention.v_proj.kernel[...])[layer].reshape(128, 2, 64)
        output = np.asarray(attention.o_proj.kernel[...])[layer].reshape(4, 64, 128)
        product = sum(value[:, h // 2] @ output[h] for h in range(4))
        np.testing.assert_allclose(product, 0.5 * np.eye(128), atol=1e-5)


def test_embedding_stream_holds_embeddings_alone():
    model = make()
    embedding_stream(model, embedding_std=0.5, logit_scale=0.1)
    tokens = jnp.asarray([[5, 9, 11]])
    output = model.prefill(tokens, return_hidden=True)
    np.testing.assert_allclose(jnp.std(model.embed.embedding[...]), 0.5, rtol=1e-3)
    for hidden in output.all_hidden[:-1]:
        np.testing.assert_array_equal(hidden, model.embed(tokens))
    rms = np.sqrt(np.mean(np.square(output.hidden), axis=-1))
    np.testing.assert_allclose(rms, 0.1, rtol=1e-3)
