"""Checkpoints in the published layout: what is saved is what is loaded, and what does not fit is named."""

import dataclasses
import functools
import json
import logging
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from msa_jax import MSAConfig
from msa_jax.checkpoints.pretrained import CheckpointError, load_model, save_model
from msa_jax.checkpoints.published import published_tensors, skeleton, to_published
from msa_jax.errors import ConfigError
from msa_jax.sharding import MeshConfig, Shardings
from msa_jax.spec import LayerSpec

CONFIG = MSAConfig(
    vocab_size=31, hidden_size=12, num_layers=5, num_heads=6, num_kv_heads=2, head_dim=4, mlp_size=20,
    router_layers=(1, 2, 4), chunk_size=4, top_k_documents=3, position_offset=5, tie_embeddings=False,
    rope_theta=5e6, norm_eps=1e-5,
)  # fmt: skip


@functools.cache
def make(config=CONFIG):
    """A model of random parameters; drawn by NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)
    graphdef, parameters = skeleton(config)
    draw = lambda v: v.replace(jnp.asarray(rng.normal(size=v.shape), v.dtype))  # noqa: E731
    return nnx.merge(graphdef, nnx.from_flat_state([(path, draw(v)) for path, v in parameters]))


def assert_equal_models(a, b):
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


def rewrite(path, change):
    """Apply `change(tensors)` to a single-file checkpoint."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.fixture
def saved(tmp_path):
    save_model(make(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "router_bias": True, "router_bias_init": 7.0, "routing_score": "dot"},
        {"dtype": "bfloat16", "proportional_attention": True},
        {"dtype": "bfloat16", "param_dtype": "bfloat16", "router_bias": True},
    ],
    ids=["untied", "ours", "mixed", "bfloat16"],
)
def test_round_trip(tmp_path, changes):
    model = make(CONFIG.replace(**changes))
    save_model(model, tmp_path / "model")
    assert_equal_models(load_model(tmp_path / "model"), model)
    assert MSAConfig.from_checkpoint(tmp_path / "model") == model.config


def test_a_mesh_gets_each_device_its_part(tmp_path):
    model = make(CONFIG.replace(vocab_size=50))
    save_model(model, tmp_path / "model")
    config = MeshConfig(data=1, memory=2, fsdp=True)
    mesh, shardings = config.make(jax.devices()[:2]), Shardings.training(config)
    loaded = load_model(tmp_path / "model", mesh=mesh, shardings=shardings)
    assert_equal_models(jax.device_get(loaded), model)
    for path, variable in nnx.to_flat_state(nnx.state(loaded)):
        matrix = path[-1] in ("kernel", "embedding")
        assert variable[...].addressable_data(0).size * (2 if matrix else 1) == variable[...].size, path


def test_published_orientation_and_names(saved):
    tensors = load_file(saved / "model.safetensors")
    model = make()
    gate = model.groups[1].mlp.gate.kernel[...]  # layers 1 and 2
    np.testing.assert_array_equal(tensors["model.layers.2.mlp.gate_proj.weight"], gate[1].T)
    np.testing.assert_array_equal(tensors["lm_head.weight"], model.lm_head.kernel[...].T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], model.embed.embedding[...])
    assert "model.layers.3.self_attn.router_q_proj.0.weight" not in tensors
    assert tensors["model.layers.4.self_attn.router_q_proj.0.weight"].shape == (24, 12)
    assert {t.name: t.shape for t in published_tensors(CONFIG)} == {k: v.shape for k, v in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, to_published(nnx.state(model), CONFIG), tensors)


def test_sharded_round_trip(tmp_path):
    model = make()
    save_model(model, tmp_path / "model", max_shard_bytes=3000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    sizes = [sum(v.nbytes for v in load_file(tmp_path / "model" / name).values()) for name in shards]
    assert index["metadata"]["total_size"] == sum(sizes)
    # Nothing but a single larger tensor exceeds the limit.
    assert all(
        size <= 3000 or len(load_file(tmp_path / "model" / name)) == 1
        for name, size in zip(shards, sizes, strict=True)
    )
    assert_equal_models(load_model(tmp_path / "model"), model)


def test_an_index_says_where_a_tensor_is_and_one_file_comes_before_it(tmp_path):
    model, name = make(), "model.norm.weight"
    save_model(model, tmp_path / "model", max_shard_bytes=3000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in set(index.values()) - {index[name]}:
        tensors = load_file(tmp_path / "model" / shard)
        save_file(tensors | {name: np.zeros(12, np.float32)}, tmp_path / "model" / shard)
    assert_equal_models(load_model(tmp_path / "model"), model)
    tensors = to_published(nnx.state(model), CONFIG)
    save_file(jax.device_get(tensors | {name: jnp.full(12, 3.0)}), tmp_path / "model" / "model.safetensors")
    np.testing.assert_array_equal(load_model(tmp_path / "model").final_norm.scale[...], 3.0)


def test_names_without_the_prefix(saved):
    tensors = load_file(saved / "model.safetensors")
    save_file({name.removeprefix("model."): x for name, x in tensors.items()}, saved / "model.safetensors")
    assert_equal_models(load_model(saved), make())


def test_tied_or_not(tmp_path, caplog):
    model = make(CONFIG.replace(tie_embeddings=True))
    save_model(model, tmp_path / "tied")
    with pytest.raises(CheckpointError, match="missing: lm_head.weight; if its output is .*tie_embeddings=True"):
        load_model(tmp_path / "tied", tie_embeddings=False)
    embedding = np.asarray(model.embed.embedding[...])
    for head, warned in ((embedding, 0), (embedding + 1, 1)):
        rewrite(tmp_path / "tied", lambda tensors, head=head: tensors.update({"lm_head.weight": head}))
        with caplog.at_level(logging.WARNING, logger="msa_jax.checkpoints.pretrained"):
            assert_equal_models(load_model(tmp_path / "tied"), model)
        assert len(caplog.messages) == warned
    assert "lm_head.weight differs from the embedding and is not read" in caplog.text


LLAMA = LayerSpec(qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True)


_GEMMA = LayerSpec(norm="rms_plus_one", post_norms=True, activation="gelu_tanh", query_scale=0.5)
GEMMA = (dataclasses.replace(_GEMMA, window=3, rope_theta=7.0), _GEMMA)


@pytest.mark.parametrize(
    ("kind", "specs", "there", "not_there"),
    [
        ("llama", (LLAMA,), "mlp.gate_proj.bias", "self_attn.q_norm.weight"),
        ("qwen2", (LayerSpec(qk_norm=False, qkv_bias=True),), "self_attn.q_proj.bias", "self_attn.o_proj.bias"),
        ("mistral", (LayerSpec(qk_norm=False, window=3),), "self_attn.q_proj.weight", "self_attn.q_proj.bias"),
        ("gemma3_text", GEMMA, "pre_feedforward_layernorm.weight", "mlp.gate_proj.bias"),
    ],
)
def test_a_model_is_saved_as_its_family(tmp_path, kind, specs, there, not_there):
    scale = 12**0.5 if kind == "gemma3_text" else 1.0
    model = make(CONFIG.replace(layer_specs=specs, embedding_scale=scale))
    save_model(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == kind
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert f"model.layers.0.{there}" in names and f"model.layers.0.{not_there}" not in names
    assert_equal_models(load_model(tmp_path / "model"), model)


def test_layers_of_no_family_are_not_saved(tmp_path):
    odd = LayerSpec(qk_norm=False, mlp_bias=True, o_bias=True)
    with pytest.raises(ConfigError, match="none of the families that can be saved: .*llama"):
        save_model(make(CONFIG.replace(layer_specs=(odd,))), tmp_path / "odd")


def test_biases_are_spread_as_what_they_are_added_to(tmp_path):
    model = make(CONFIG.replace(vocab_size=50, layer_specs=(LLAMA,)))
    save_model(model, tmp_path / "model")
    config = MeshConfig(data=1, memory=1, model=2)
    mesh, shardings = config.make(jax.devices()[:2]), Shardings.training(config)
    attention = load_model(tmp_path / "model", mesh=mesh, shardings=shardings).groups[0].attention
    assert attention.q_proj.bias[...].sharding.spec == jax.P(None, "model")
    assert attention.o_proj.bias[...].addressable_data(0).shape == attention.o_proj.bias[...].shape


def test_casts_to_the_config_asked_for(saved):
    model = load_model(saved, dtype="bfloat16", param_dtype="bfloat16", top_k_documents=1)
    assert model.config == CONFIG.replace(dtype="bfloat16", param_dtype="bfloat16", top_k_documents=1)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    embedding = make().embed.embedding[...].astype(jnp.bfloat16)
    np.testing.assert_array_equal(model.embed.embedding[...], embedding)
    assert_equal_models(load_model(saved, CONFIG, remat="full"), make(CONFIG.replace(remat="full")))


def test_loaded_model_computes_the_same(saved):
    tokens = jnp.arange(14).reshape(2, 7)
    a, b = make().prefill(tokens), load_model(saved).prefill(tokens)
    np.testing.assert_array_equal(a.hidden, b.hidden)


def test_memory_stays_near_one_copy(tmp_path):
    config = CONFIG.replace(hidden_size=96, mlp_size=256, num_layers=8, router_layers=(6, 7))
    model = make(config)
    sizes = [x.nbytes for x in jax.tree.leaves(nnx.state(model))]
    save_model(model, tmp_path / "first", max_shard_bytes=200_000)  # imports outside the measurement
    tracemalloc.start()
    save_model(model, tmp_path / "model", max_shard_bytes=200_000)
    saving = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    load_model(tmp_path / "model")  # compile and import outside the measurement
    tracemalloc.start()
    loaded = load_model(tmp_path / "model")
    loading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_equal_models(loaded, model)
    slack = 500_000
    assert max(sizes) > slack and sum(sizes) > 4 * max(sizes)
    assert loading < sum(sizes) + 1.5 * max(sizes) + slack
    assert saving < 2 * 200_000 + slack


def test_qwen3_gets_a_router_and_says_so(saved, caplog):
    def strip(tensors):
        for name in [n for n in tensors if ".router_" in n]:
            del tensors[name]
        tensors["temperature"] = np.full((), 0.1, np.float32)

    rewrite(saved, strip)
    config = json.loads((saved / "config.json").read_text())
    del config["msa_config"]
    (saved / "config.json").write_text(json.dumps(config))
    changes = dict(chunk_size=4, top_k_documents=3, router_layers=(1, 2, 4), router_bias=True, router_bias_init=9.0)
    with caplog.at_level(logging.WARNING, logger="msa_jax.checkpoints.pretrained"):
        model = load_model(saved, seed=1, **changes)
    (fresh,) = caplog.messages
    assert "model.layers.1.self_attn.router_q_proj.0.weight" in fresh and "and 6 more (9)" in fresh
    assert "means nothing until it is trained" in fresh
    group = model.groups[1].attention
    np.testing.assert_array_equal(group.router_beta[...], np.full((2, 6), 9.0))
    kernel = np.asarray(group.router_q_proj.kernel[...])
    assert np.abs(kernel[0] - kernel[1]).min() > 0  # layers differ
    assert abs(kernel.std() - 12**-0.5) < 0.05  # 1 / sqrt(fan in)
    np.testing.assert_array_equal(group.q_proj.kernel[...], make().groups[1].attention.q_proj.kernel[...])
    assert_equal_models(load_model(saved, seed=1, **changes), model)
    other = load_model(saved, seed=2, **changes)
    assert not np.array_equal(other.groups[1].attention.router_q_proj.kernel[...], kernel)


def test_all_faults_are_named_at_once(saved):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.4.self_attn.router_q_proj.0.weight"]  # half a router is not a fresh one
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((12, 20), np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)

    rewrite(saved, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    message = str(caught.value)
    for part in (
        "missing: ", "model.norm.weight", "model.layers.4.self_attn.router_q_proj.0.weight",
        "unexpected: model.layers.9.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight is [12, 20] where the config needs [20, 12]",
        "lm_head.weight is I32",
    ):  # fmt: skip
        assert part in message
    assert "model.layers.1" not in message


def damage_config(path):
    (path / "config.json").write_text("{")


def damage_list(path):
    (path / "config.json").write_text("[1]")


def damage_weights(path):
    (path / "model.safetensors").write_bytes(b"not tensors")


def lose_config(path):
    (path / "config.json").unlink()


def lose_weights(path):
    (path / "model.safetensors").unlink()


def damage_index(path, text):
    (path / "model.safetensors").rename(path / "whole.safetensors")
    (path / "model.safetensors.index.json").write_text(text)


def lose_shard(path):
    damage_index(path, '{"weight_map": {"lm_head.weight": "gone.safetensors"}}')


def escape(path):
    damage_index(path, '{"weight_map": {"lm_head.weight": "../x.safetensors"}}')


def odd_index(path):
    damage_index(path, '{"weight_map": [1]}')


def index_of_more(path):
    names = dict.fromkeys(["lm_head.weight", "a", "b", "c", "d"], "whole.safetensors")
    damage_index(path, json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (damage_config, ConfigError, "config.json: not valid JSON"),
        (damage_list, ConfigError, "must hold a JSON object"),
        (lose_config, ConfigError, "config.json: no such file"),
        (damage_weights, CheckpointError, "model.safetensors: not a readable safetensors file"),
        (lose_weights, CheckpointError, "holds neither model.safetensors nor"),
        (lose_shard, CheckpointError, "gone.safetensors: no such file"),
        (escape, CheckpointError, "weight_map must map tensors to files of this folder"),
        (odd_index, CheckpointError, "weight_map must map tensors to files of this folder"),
        (index_of_more, CheckpointError, r"lacks what .* says it holds: a, b, c and 1 more \(4\)"),
    ],
)
def test_damaged_folders(saved, damage, error, match):
    damage(saved)
    with pytest.raises(error, match=match):
        load_model(saved)


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("num_hidden_layers", "5", "must be an integer"),
        ("msa_config", [1], "msa_config must be an object"),
        ("msa_config", {"router_layer_idx": "2,x"}, "router_layer_idx must be 'all' or layers like '2,3'"),
        ("msa_config", {"top_k_docs": "3"}, "top_k_docs must be an integer"),
        ("msa_config", {"jax_future": 1}, r"settings unknown to this version: \['future'\]"),
        ("msa_config", {"query_reduce_method": "last"}, "query_reduce_method is 'last', need 'max'"),
    ],
)
def test_unfit_configs(saved, setting, value, match):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(ConfigError, match=match):
        load_model(saved)


def test_save_is_whole_or_absent(tmp_path, monkeypatch):
    model = make()
    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr("msa_jax.checkpoints.pretrained.published_config", lambda config: {}["disk full"])
        with pytest.raises(KeyError):
            save_model(model, target)
    assert list(tmp_path.iterdir()) == []
    target.mkdir()  # an empty folder is fine
    save_model(model, target)
    with pytest.raises(CheckpointError, match="exists; remove it or give another folder"):
        save_model(model, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
