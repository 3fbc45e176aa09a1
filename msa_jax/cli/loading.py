"""Flags of the commands that ask a bank: how it is loaded and read, and where compiled programs are kept."""

from __future__ import annotations

import argparse
import json
from typing import Any

from msa_jax.cli import compilation
from msa_jax.config import RENAMED, RuntimeConfig
from msa_jax.errors import ConfigError
from msa_jax.sharding import MeshConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add them; `loading_of` reads those of the bank, `changes_of` those of the model."""
    group = parser.add_argument_group("how the bank is loaded")
    group.add_argument(
        "--content",
        choices=("device", "host", "disk"),
        default="device",
        help="where keys and values that are attended to lie; routing keys are on the device (default %(default)s)",
    )
    for name, what in (("key_dtype", "routing keys"), ("content_dtype", "keys and values")):
        group.add_argument(f"--{name}", choices=("int8",), help=f"quantise {what} while loading; default as stored")
    for axis, what in (("memory", "the documents"), ("model", "heads and hidden units, and the documents")):
        group.add_argument(
            f"--mesh_{axis}", type=int, default=1, metavar="N", help=f"devices that share {what} (default %(default)s)"
        )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help=f"change how the model runs, such as top_k_documents=4; of {', '.join(RuntimeConfig.names())}; repeatable",
    )  # fmt: skip
    compilation.add_flag(group)


def loading_of(options: argparse.Namespace) -> dict[str, Any]:
    """Options of `msa_jax.bank.load`; from here on compiled programs are kept.

    Raises:
      ConfigError: a mesh that there are not the devices for.
    """
    compilation.keep_programs(options.compiled)
    loading = dict(content=options.content, key_dtype=options.key_dtype, content_dtype=options.content_dtype)
    if (options.mesh_memory, options.mesh_model) != (1, 1):
        loading["mesh"] = MeshConfig(memory=options.mesh_memory, model=options.mesh_model).make()
    return loading


def changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of the model that --set changes; raises ConfigError for one that a bank depends on."""
    changes = {}
    for given in options.set:
        name, equals, value = given.partition("=")
        if name in RENAMED:
            raise ConfigError(f"--set {given}: {name} of a model is now {RENAMED[name]}.")
        if not equals or name not in RuntimeConfig.names():
            raise ConfigError(f"--set {given}: give NAME=VALUE, the name one of {', '.join(RuntimeConfig.names())}.")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value  # a word
    return changes
