"""`python -m msa_jax.parity` on what transformers recorded of tiny models of every family that loads."""

import json
import re
import shutil

import pytest

from msa_jax.parity.__main__ import main

RECORDED = (
    "qwen3", "qwen3_legacy_untied_sharded", "qwen3_yarn", "qwen2_bias", "llama3", "smollm2", "mistral_window",
    "gemma3_text",
)  # fmt: skip


def recorded(test_data, name):
    folder = test_data / "goldens" / "hf" / name
    if not folder.is_dir():
        pytest.skip(f"no recording {name} in the test data")
    return folder


@pytest.mark.parametrize("name", RECORDED)
def test_agrees_with_transformers(test_data, capsys, name):
    assert main([str(recorded(test_data, name))]) == 0
    printed = capsys.readouterr().out
    assert "24 equal" in printed and f"{9 if name == 'gemma3_text' else 7} compared" in printed


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("qwen3_yarn", "factor", 4.5),
        pytest.param("qwen3_yarn", "beta_slow", 0.5, marks=pytest.mark.slow),
        pytest.param("llama3", "high_freq_factor", 4.5, marks=pytest.mark.slow),
        ("gemma3_text", "sliding_window", 9),
        pytest.param("gemma3_text", "query_pre_attn_scalar", 17, marks=pytest.mark.slow),
    ],
)
def test_another_layer_is_seen(test_data, tmp_path, capsys, name, field, value):
    folder = shutil.copytree(recorded(test_data, name), tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    within = next((config[part] for part in ("rope_parameters", "rope_scaling") if part in config), config)
    (config if field in config else within)[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert main([str(folder)]) == 1
    failed = re.findall(r"^  FAIL.{34}(\S+)", capsys.readouterr().out, re.MULTILINE)
    assert "hidden_0" not in failed and "logits" in failed
