"""The examples run as a reader would run them, and learn; the layer through the bridge to Linen."""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from msa_jax import AttentionConfig, MemorySparseAttention
from msa_jax.memory import DocumentLayout

CONFIG = AttentionConfig(hidden_size=10, num_heads=4, num_kv_heads=2, head_dim=4, chunk_size=4, top_k_documents=2)
POSITIONS = np.broadcast_to(np.arange(8, dtype=np.int32), (3, 8))
LAYOUT = DocumentLayout.from_chunk_documents([0, 0, 1, 1, 2, 2], 3)


@pytest.mark.parametrize("name", ["embed_in_nnx", pytest.param("embed_in_linen", marks=pytest.mark.slow)])
def test_examples_learn(root, name, capsys):
    """The last loss is far below what guessing among the values gives, log 20 and more."""
    spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first, last = module.main()
    assert first > 3.5 and last < 1.2, (first, last)
    assert "step" in capsys.readouterr().out


class DirectReader(nn.Module):
    """The layer itself through the bridge: `encode`, `memory` and the call are methods of one submodule."""

    @nn.compact
    def __call__(self, documents, questions):
        layer = bridge.ToLinen(MemorySparseAttention, args=(CONFIG,), name="layer")
        _, states = layer.encode(documents, positions=POSITIONS, segment_ids=np.ones((3, 8), np.int32))
        memory = layer.memory(states, LAYOUT)
        return layer(questions, positions=POSITIONS[:2, :5] + CONFIG.position_offset, memory=memory).out


@jax.jit
def _directly(split, documents, questions):
    layer = nnx.merge(*split)
    _, states = layer.encode(documents, positions=POSITIONS, segment_ids=np.ones((3, 8), np.int32))
    memory = layer.memory(states, LAYOUT)
    return layer(questions, positions=POSITIONS[:2, :5] + CONFIG.position_offset, memory=memory).out


def test_methods_of_the_layer_share_parameters_through_the_bridge():
    rng, model = np.random.default_rng(0), DirectReader()
    documents, questions = (rng.normal(size=n).astype(np.float32) for n in ((3, 8, 10), (2, 5, 10)))
    variables = jax.jit(model.init)(jax.random.key(0), documents, questions)
    assert set(variables) == {"params"} and set(variables["params"]) == {"layer"}

    def loss(variables):
        out = model.apply(variables, documents, questions)
        return jnp.sum(out**2), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(variables)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MemorySparseAttention(CONFIG, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, variables["params"]["layer"])
    np.testing.assert_allclose(out, _directly((graphdef, state), documents, questions), atol=1e-5)
    assert all(np.any(grads["params"]["layer"][f"{name}_proj"]["kernel"]) for name in "qkvo")
