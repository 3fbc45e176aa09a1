"""How the commands that ask load a bank."""

import argparse

import jax
import pytest

from msa_jax import compilation
from msa_jax.ask.loading import add_flags, loading_of
from msa_jax.compilation import keep_programs
from msa_jax.config import ConfigError


def options(*flags):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(["--compiled=", *flags])


def test_flags_become_options_of_load():
    assert loading_of(options()) == dict(content="device", key_dtype=None, content_dtype=None)
    some = loading_of(options("--content=disk", "--key_dtype=int8"))
    assert some == dict(content="disk", key_dtype="int8", content_dtype=None)


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
