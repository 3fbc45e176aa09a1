"""Configurations: what they refuse, presets at full size, round trips, and published files."""

import json
import math

import jax
import pytest
from flax import nnx

from msa_jax import AttentionConfig, MSAConfig, MSATransformer
from msa_jax.config import PRESETS
from msa_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *((dict([(name, 0)]), f"{name} must be an integer of at least 1, got 0.")
          for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "chunk_size", "top_k")),
        (dict(chunk_size=2.0), "chunk_size must be an integer of at least 1, got 2.0."),
        (dict(top_k=True), "top_k must be an integer of at least 1, got True."),
        (dict(hidden_size="64"), "hidden_size must be an integer of at least 1, got '64'."),
        (dict(num_heads=6, num_kv_heads=4), "num_heads (6) must be a multiple of num_kv_heads (4)."),
        (dict(head_dim=7), "head_dim must be even for RoPE, got 7."),
        (dict(rope_theta=0.0), "rope_theta must be positive, got 0.0."),
        (dict(norm_eps=-1e-6), "norm_eps must be positive, got -1e-06."),
        (dict(router_bias_scale=0), "router_bias_scale must be positive, got 0."),
        (dict(rope_theta="5e6"), "rope_theta must be positive, got '5e6'."),
        (dict(norm_eps=float("nan")), "norm_eps must be positive, got nan."),
        (dict(position_offset=-1), "position_offset must be an integer of at least 0, got -1."),
        (dict(position_offset=1.5), "position_offset must be an integer of at least 0, got 1.5."),
        (dict(routing_score="l2"), "routing_score must be one of ('cosine', 'dot'), got 'l2'."),
        (dict(dtype="float16"), "dtype must be one of ('float32', 'bfloat16'), got 'float16'."),
        (dict(param_dtype="int8"), "param_dtype must be one of ('float32', 'bfloat16'), got 'int8'."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("config", [AttentionConfig, MSAConfig])
def test_attention_settings_that_cannot_work(config, changes, message):
    with pytest.raises(ConfigError) as error:
        config(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *((dict([(name, 0)]), f"{name} must be an integer of at least 1, got 0.")
          for name in ("vocab_size", "num_layers", "mlp_size")),
        (dict(mlp_size=1.5), "mlp_size must be an integer of at least 1, got 1.5."),
        (dict(num_layers=True), "num_layers must be an integer of at least 1, got True."),
        (dict(router_layers=()), "router_layers must be sorted, distinct and not empty, got ()."),
        (dict(router_layers=(2, 1)), "router_layers must be sorted, distinct and not empty, got (2, 1)."),
        (dict(router_layers=(1, 1)), "router_layers must be sorted, distinct and not empty, got (1, 1)."),
        (dict(router_layers=(3, 4)), "router_layers must lie in 0..3 (num_layers 4), got (3, 4)."),
        (dict(router_layers=(-1, 2)), "router_layers must lie in 0..3 (num_layers 4), got (-1, 2)."),
        (dict(router_layers="1,2"), "router_layers must be integers, got '1,2'."),
        (dict(router_layers=3), "router_layers must be integers, got 3."),
        (dict(router_layers=(0.5, 2)), "router_layers must be integers, got (0.5, 2)."),
        (dict(remat="some"), "remat must be one of ('none', 'dots', 'full'), got 'some'."),
    ],
)  # fmt: skip
def test_model_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigError) as error:
        MSAConfig(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("num_layers", "given", "layers", "groups"),
    [
        (4, None, (2, 3), ((False, 0, 2), (True, 2, 2))),
        (5, None, (2, 3, 4), ((False, 0, 2), (True, 2, 3))),
        (1, None, (0,), ((True, 0, 1),)),
        (4, [0, 2, 3], (0, 2, 3), ((True, 0, 1), (False, 1, 1), (True, 2, 2))),
        (3, (1,), (1,), ((False, 0, 1), (True, 1, 1), (False, 2, 1))),
        (3, range(3), (0, 1, 2), ((True, 0, 3),)),
    ],
)
def test_router_layers_and_runs_of_equal_layers(num_layers, given, layers, groups):
    config = MSAConfig(num_layers=num_layers, router_layers=given)
    assert config.router_layers == layers and config.layer_groups == groups
    assert hash(config) == hash(config.replace())  # a static argument of jit


def parameters(c: MSAConfig) -> int:
    """Embedding and final norm; a layer's norms, four projections and SwiGLU; a router layer's two more."""
    attention = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads) + 2 * c.head_dim
    layer = 2 * c.hidden_size + attention + 3 * c.hidden_size * c.mlp_size
    router = c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads) + c.router_bias * c.num_heads
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
    return embeddings + c.hidden_size + c.num_layers * layer + len(c.router_layers) * router


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=False, router_bias=True)])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_a_model_of_the_expected_size(name, changes):
    config = MSAConfig.preset(name, **changes)
    model = nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
    assert count == parameters(config)
    # The published backbones have 596,049,920 and 4,022,468,096; their routers come on top.
    published = {"qwen3_0_6b": 596_049_920, "qwen3_4b": 4_022_468_096}
    if name in published and not changes:
        per_router = config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
        assert count == published[name] + len(config.router_layers) * per_router


def test_preset_of_the_paper():
    config = MSAConfig.preset("qwen3_4b")
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (36, 32, 8, 128)
    assert config.router_layers == tuple(range(18, 36)) and (config.group_size, config.router_width) == (4, 1024)
    assert (config.chunk_size, config.top_k, config.position_offset, config.rope_theta) == (64, 16, 19, 5e6)
    assert config.tie_embeddings and not config.router_bias and config.routing_score == "cosine"
    # k in use does not move positions.
    assert config.replace(top_k=4).position_offset == 19
    with pytest.raises(ConfigError, match="Unknown preset 'huge'; choose one of .*'qwen3_4b'"):
        MSAConfig.preset("huge")


CONFIGS = [
    MSAConfig(),
    MSAConfig.preset("qwen3_4b", dtype="bfloat16", param_dtype="bfloat16", remat="full"),
    MSAConfig(router_layers=(0, 3), routing_score="dot", router_bias=True, position_offset=3, tie_embeddings=False),
    MSAConfig(proportional_attention=True),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_through_json(config):
    values = config.to_dict()
    assert values["router_layers"] == list(config.router_layers)
    assert json.loads(json.dumps(values)) == values and MSAConfig.from_dict(values) == config


def test_from_dict_names_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"Unknown model settings \['heads', 'layers'\]; known ones are \['chunk"):
        MSAConfig.from_dict(dict(layers=3, heads=2, top_k=4))
    assert MSAConfig.from_dict(dict(top_k=4, router_layers=None)) == MSAConfig(top_k=4)


PUBLISHED = dict(
    vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=5e6, torch_dtype="bfloat16",
)  # fmt: skip
MSA = dict(pooling_kernel_size=32, top_k_docs=8, router_layer_idx="3,5")


def write(tmp_path, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED | changes))
    return path


def test_from_checkpoint_reads_the_published_fields(tmp_path):
    path = write(tmp_path, msa_config=MSA)
    config = MSAConfig.from_checkpoint(path)
    assert config == MSAConfig(
        vocab_size=100, hidden_size=48, mlp_size=80, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=12,
        norm_eps=1e-5, rope_theta=5e6, dtype="bfloat16", param_dtype="bfloat16", tie_embeddings=False, chunk_size=32,
        top_k=8, position_offset=11, router_layers=(3, 5),
    )  # fmt: skip
    assert MSAConfig.from_checkpoint(tmp_path) == config  # the folder
    changes = dict(remat="dots", dtype="float32")
    assert MSAConfig.from_checkpoint(path, **changes) == config.replace(**changes)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({}, "router_layers", (3, 4, 5)),
        (dict(msa_config=MSA | dict(router_layer_idx="all")), "router_layers", (0, 1, 2, 3, 4, 5)),
        (dict(msa_config=MSA | dict(router_layer_idx=[5, 1])), "router_layers", (1, 5)),
        (dict(msa_config=MSA | dict(router_layer_idx=" 4, 2,")), "router_layers", (2, 4)),
        (dict(head_dim=16), "head_dim", 16),
        (dict(tie_word_embeddings=True), "tie_embeddings", True),
        (dict(rope_theta=None, rope_parameters=dict(rope_theta=7.0)), "rope_theta", 7.0),
        (dict(rope_theta=None), "rope_theta", 1e4),
        (dict(torch_dtype="float16"), "dtype", "float32"),
        (dict(torch_dtype=None, dtype="bfloat16"), "param_dtype", "bfloat16"),
        ({}, "position_offset", 19),
    ],
)
def test_from_checkpoint_reads_variants(tmp_path, changes, field, value):
    assert getattr(MSAConfig.from_checkpoint(write(tmp_path, **changes)), field) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_size=None), r"\['hidden_size'\] must be integers"),
        (dict(vocab_size="100", num_hidden_layers=None), r"\['vocab_size', 'num_hidden_layers'\] must be integers"),
        (dict(attention_bias=True), "attention_bias is true"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu', need 'silu'"),
        (dict(rope_scaling=dict(type="yarn")), "rope_scaling is set"),
        (dict(msa_config=[1]), r"msa_config must be an object, is \[1\]"),
        (dict(msa_config=MSA | dict(head_reduce_method="max")), "msa_config.head_reduce_method is 'max', need 'mean'"),
        (dict(msa_config=MSA | dict(decouple_router=False)), "msa_config.decouple_router is False, need True"),
        (dict(msa_config=MSA | dict(top_k_docs="8")), "msa_config.top_k_docs must be an integer, is '8'"),
        (dict(msa_config=MSA | dict(router_layer_idx="upper")), "must be 'all' or layers like '2,3', is .*upper"),
        (dict(msa_config=MSA | dict(router_layer_idx=4)), "must be 'all' or layers like '2,3', is 4"),
        (dict(msa_config=MSA | dict(jax_future=1)), r"settings unknown to this version: \['future'\]"),
    ],
)
def test_from_checkpoint_says_what_is_wrong(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        MSAConfig.from_checkpoint(tmp_path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give a checkpoint folder with a config.json"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "must hold a JSON object, holds a list"),
    ],
)
def test_from_checkpoint_of_a_file_that_is_none(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        MSAConfig.from_checkpoint(path)
    assert str(path) in str(error.value)
