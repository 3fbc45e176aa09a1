"""How the commands that ask load a bank."""

import argparse

import jax
import pytest

from msa_jax.cli import compilation
from msa_jax.cli.compilation import keep_programs
from msa_jax.cli.loading import add_flags, changes_of, loading_of
from msa_jax.errors import ConfigError


def options(*flags):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(["--compiled=", *flags])


def test_flags_become_options_of_load():
    assert loading_of(options()) == dict(content="device", key_dtype=None, content_dtype=None)
    some = loading_of(options("--content=disk", "--key_dtype=int8"))
    assert some == dict(content="disk", key_dtype="int8", content_dtype=None)


def test_settings_of_the_model_that_a_bank_does_not_depend_on_can_be_changed():
    assert changes_of(options()) == {}
    given = ("--set=top_k_documents=4", "--set", "retriever=two_level:group=8", "--set=router_bias_scale=1.5")
    some = changes_of(options(*given))
    assert some == dict(top_k_documents=4, retriever="two_level:group=8", router_bias_scale=1.5)
    for wrong in ("top_k_documents", "chunk_size=8", "=4"):
        with pytest.raises(ConfigError, match=f"^--set {wrong}: give NAME=VALUE, the name one of top_k_documents, "):
            changes_of(options(f"--set={wrong}"))
    with pytest.raises(ConfigError, match="^--set top_k=4: top_k of a model is now top_k_documents.$"):
        changes_of(options("--set=top_k=4"))


def test_a_mesh_takes_all_devices_or_says_what_it_needs():
    count = len(jax.devices())
    mesh = loading_of(options(f"--mesh_memory={count}"))["mesh"]
    assert dict(mesh.shape) == {"data": 1, "memory": count, "model": 1}
    with pytest.raises(ConfigError, match="devices"):
        loading_of(options(f"--mesh_memory={count + 1}"))
    with pytest.raises(ConfigError):
        loading_of(options("--mesh_model=0"))


def test_programs_are_kept_where_the_flag_says_and_apart_by_processor(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    seen = {}
    monkeypatch.setattr(jax.config, "update", seen.__setitem__)
    keep_programs("")
    assert not seen
    keep_programs(str(tmp_path))
    kept = seen["jax_compilation_cache_dir"]
    assert kept.startswith(str(tmp_path)) and kept != str(tmp_path)
    monkeypatch.setattr(compilation.platform, "processor", lambda: "another")
    keep_programs(str(tmp_path))
    assert seen["jax_compilation_cache_dir"] != kept
    assert jax.config.jax_compilation_cache_dir == before
