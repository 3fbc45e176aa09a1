"""Configurations: what they refuse, presets at full size, round trips, and published files."""

import json
import math

import jax
import pytest
from flax import nnx

from msa_jax import AttentionConfig, MSAConfig, MSATransformer
from msa_jax.checkpoints.published import published_config
from msa_jax.config import PRESETS
from msa_jax.errors import ConfigError
from msa_jax.spec import LayerSpec, RopeScaling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *((dict([(name, 0)]), f"{name} must be an integer of at least 1, got 0.")
          for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "chunk_size", "top_k_documents")),
        (dict(chunk_size=2.0), "chunk_size must be an integer of at least 1, got 2.0."),
        (dict(top_k_documents=True), "top_k_documents must be an integer of at least 1, got True."),
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


def test_layers_of_two_kinds_repeat():
    a, b = LayerSpec(), LayerSpec(qk_norm=False)
    config = MSAConfig(num_layers=5, router_layers=(2, 4), layer_specs=(a, a, b))
    assert [config.spec_of(i) for i in range(5)] == [a, a, b, a, a]
    assert config.layer_groups == ((False, 0, 2), (True, 2, 1), (False, 3, 1), (True, 4, 1))
    assert MSAConfig(layer_specs=[b, b]).layer_specs == (b,)
    assert MSAConfig(layer_specs=[a, b, a, b]) == MSAConfig(layer_specs=[a, b])
    with pytest.raises(ConfigError, match="layer_specs must be 1 to 4 LayerSpec, got"):
        MSAConfig(layer_specs=(a,) * 5)
    with pytest.raises(ConfigError, match=r"Layers have settings unknown to this version: \['nope'\]"):
        MSAConfig.from_dict(dict(layer_specs=[dict(nope=1)]))


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
    assert (config.chunk_size, config.top_k_documents, config.position_offset, config.rope_theta) == (64, 16, 19, 5e6)
    assert config.tie_embeddings and not config.router_bias and config.routing_score == "cosine"
    # k in use does not move positions.
    assert config.replace(top_k_documents=4).position_offset == 19
    with pytest.raises(ConfigError, match="Unknown preset 'huge'; choose one of .*'qwen3_4b'"):
        MSAConfig.preset("huge")


CONFIGS = [
    MSAConfig(),
    MSAConfig.preset("qwen3_4b", dtype="bfloat16", param_dtype="bfloat16", remat="full"),
    MSAConfig(router_layers=(0, 3), routing_score="dot", router_bias=True, position_offset=3, tie_embeddings=False),
    MSAConfig(proportional_attention=True),
    MSAConfig(layer_specs=(LayerSpec(), LayerSpec(qk_norm=False, rope_theta=5.0))),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_through_json(config):
    values = config.to_dict()
    assert values["router_layers"] == list(config.router_layers)
    assert json.loads(json.dumps(values)) == values and MSAConfig.from_dict(values) == config


def test_from_dict_names_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"Unknown model settings \['heads', 'layers'\]; known ones are \['chunk"):
        MSAConfig.from_dict(dict(layers=3, heads=2, top_k_documents=4))
    assert MSAConfig.from_dict(dict(top_k_documents=4, router_layers=None)) == MSAConfig(top_k_documents=4)


PUBLISHED = dict(
    vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-5, rope_theta=5e6, torch_dtype="bfloat16",
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
        top_k_documents=8, position_offset=11, router_layers=(3, 5),
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
        (dict(head_dim=None), "head_dim", 128),
        (dict(head_dim=None, model_type="llama"), "head_dim", 12),
        (dict(num_key_value_heads=None, model_type="llama"), "num_kv_heads", 4),
        (dict(rms_norm_eps=None), "norm_eps", 1e-6),
        (dict(tie_word_embeddings=None), "tie_embeddings", False),
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
        (dict(hidden_size=None), "hidden_size must be an integer of at least 1, is None"),
        (dict(vocab_size="100", num_hidden_layers=None), "vocab_size must be an integer of at least 1, is '100'"),
        (dict(num_attention_heads=0, head_dim=None), "num_attention_heads must be an integer of at least 1, is 0"),
        (dict(num_key_value_heads=3), r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        (dict(rope_theta=[1000000]), r"rope_theta must be a positive number, is \[1000000\]"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps must be a positive number, is nan"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings must be true or false, is 'false'"),
        (dict(attention_bias="yes"), "attention_bias must be true or false, is 'yes'"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu', need 'silu'"),
        (dict(model_type="qwen3_moe"), "model_type 'qwen3_moe' is not read here, only .*llama.*qwen3"),
        (dict(model_type=["qwen3"]), "model_type .* is not read here"),
        (dict(num_experts=8), "num_experts 8 is not computed here"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not computed here"),
        (dict(quantization_config=dict(quant_method="fp8")), "quantization_config .* is not computed here"),
        (dict(use_sliding_window=True, sliding_window=0), "sliding_window must be an integer of at least 1, is 0"),
        (dict(layer_types=["sliding_attention"] * 6), "layer_types has 'sliding_attention', but there is no sliding"),
        (dict(layer_types=["full_attention"] * 5), "layer_types must be 6 words"),
        (dict(model_type="mistral", layer_types="full"), "layer_types must be 6 words"),
        (dict(model_type="gemma3_text", hidden_act="silu"), "hidden_act is 'silu', need 'gelu_pytorch_tanh'"),
        (dict(model_type="gemma3_text", final_logit_softcapping=30.0), "final_logit_softcapping 30.0 is not computed"),
        (dict(model_type="gemma3", text_config={}), "model_type 'gemma3' is not read .*text-only checkpoint"),
        (dict(model_type="qwen2", attention_bias=True), "attention_bias True is not computed here"),
        (dict(layer_types=["linear_attention"] + ["full_attention"] * 5), "layer_types has 'linear_attention'"),
        (dict(rope_scaling=dict(type="yarn")), "rope_scaling.factor must be a positive number, is None"),
        (dict(rope_scaling=dict(type="yarn", factor=0.5)), "RoPE factor must be at least 1, got 0.5"),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_scaling.rope_type is 'dynamic', need default or"),
        (dict(rope_scaling=dict(type="linear", factor=2.0, odd=1)), "rope_scaling.odd 1 is not computed here"),
        (dict(rope_parameters=dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)),
         "rope_parameters.low_freq_factor must be a positive number"),
        (dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=dict(rope_type="default")),
         "rope_scaling and rope_parameters say different things"),
        (dict(msa_config=[1]), r"msa_config must be an object, not \[1\]"),
        (dict(msa_config=MSA | dict(head_reduce_method="max")), "msa_config.head_reduce_method is 'max', need 'mean'"),
        (dict(msa_config=MSA | dict(decouple_router=False)), "msa_config.decouple_router is False, need True"),
        (dict(msa_config=MSA | dict(top_k_docs="8")), "msa_config.top_k_docs must be an integer of at least 1, is '8'"),
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


YARN = dict(factor=4.0, original_max_position_embeddings=32, beta_fast=16.0, truncate=False)


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        ({}, LayerSpec()),
        (dict(model_type="llama"), LayerSpec(qk_norm=False)),
        (dict(model_type="llama", attention_bias=True), LayerSpec(qk_norm=False, qkv_bias=True, o_bias=True)),
        (dict(model_type="llama", mlp_bias=True), LayerSpec(qk_norm=False, mlp_bias=True)),
        (dict(attention_bias=True), LayerSpec(qkv_bias=True, o_bias=True)),
        # Fields that say nothing.
        (dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28, attn_logit_softcapping=None,
              layer_types=["full_attention"] * 6, partial_rotary_factor=1.0, use_mrope=False, eos_token_id=[1, 2]),
         LayerSpec()),
        (dict(rope_scaling=dict(rope_type="default")), LayerSpec()),
        (dict(rope_scaling=dict(type="linear", factor=2)),
         LayerSpec(rope_scaling=RopeScaling(kind="linear", factor=2))),
        (dict(rope_scaling=dict(type="yarn", **YARN)),
         LayerSpec(rope_scaling=RopeScaling(kind="yarn", factor=4, original_length=32, beta_fast=16, truncate=False))),
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=5e6, **YARN), rope_theta=None),
         LayerSpec(rope_scaling=RopeScaling(kind="yarn", factor=4, original_length=32, beta_fast=16, truncate=False))),
        # Without its own, the length of the training is the model's.
        (dict(rope_scaling=dict(type="yarn", factor=4, attention_factor=1.5)),
         LayerSpec(rope_scaling=RopeScaling(kind="yarn", factor=4, original_length=32_768, attention_factor=1.5))),
    ],
)  # fmt: skip
def test_what_the_layers_of_a_checkpoint_are(tmp_path, changes, spec):
    config = MSAConfig.from_checkpoint(write(tmp_path, **changes))
    assert (config.layer_specs, config.rope_theta) == ((spec,), 5e6)
    assert_round_trip(tmp_path, config)


def assert_round_trip(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(published_config(config)))
    assert MSAConfig.from_checkpoint(tmp_path) == config
    assert MSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


WINDOWS = dict(use_sliding_window=True, sliding_window=7)
KINDS = ["sliding_attention", "full_attention"] * 3


@pytest.mark.parametrize(
    ("changes", "windows", "routers"),
    [
        (WINDOWS | dict(max_window_layers=4), [None] * 4 + [7, 7], (3,)),
        (WINDOWS, [None] * 6, (3, 4, 5)),  # max_window_layers is 28
        (WINDOWS | dict(model_type="qwen2", layer_types=KINDS), [7, None] * 3, (3, 5)),
        (dict(model_type="mistral"), [4096] * 6, (3, 4, 5)),
        (dict(model_type="mistral", sliding_window=None), [None] * 6, (3, 4, 5)),
        (dict(model_type="gemma3_text"), [4096] * 5 + [None], (5,)),
        (dict(model_type="gemma3_text", sliding_window=5, sliding_window_pattern=2), [5, None] * 3, (3, 5)),
        (dict(model_type="gemma3_text", layer_types=["full_attention"] * 6), [None] * 6, (3, 4, 5)),
    ],
)
def test_windows_and_the_layers_that_may_route(tmp_path, changes, windows, routers):
    config = MSAConfig.from_checkpoint(write(tmp_path, **changes))
    assert [config.spec_of(i).window for i in range(6)] == windows and config.router_layers == routers
    assert_round_trip(tmp_path, config)


@pytest.mark.parametrize(
    "ropes",
    [
        dict(rope_theta=8e5, rope_local_base_freq=7e3, rope_scaling=dict(rope_type="linear", factor=8.0)),
        dict(rope_theta=None, rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=8e5),
            sliding_attention=dict(rope_type="default", rope_theta=7e3),
        )),
    ],
)  # fmt: skip
def test_gemma(tmp_path, ropes):
    others = dict(query_pre_attn_scalar=9, hidden_activation="gelu_pytorch_tanh")
    config = MSAConfig.from_checkpoint(write(tmp_path, model_type="gemma3_text", **others, **ropes))
    assert config.tie_embeddings and config.embedding_scale == 48**0.5 and config.rope_theta == 8e5
    both = dict(norm="rms_plus_one", post_norms=True, activation="gelu_tanh", query_scale=1 / 3)
    assert config.spec_of(0) == LayerSpec(window=4096, rope_theta=7e3, **both)
    assert config.spec_of(5) == LayerSpec(rope_scaling=RopeScaling(kind="linear", factor=8.0), **both)
    assert_round_trip(tmp_path, config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give a checkpoint folder with a config.json"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", r"must hold a JSON object, not \[\]"),
    ],
)
def test_from_checkpoint_of_a_file_that_is_none(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        MSAConfig.from_checkpoint(path)
    assert str(path) in str(error.value)
