"""Flags of the commands that ask a bank: how it is loaded, and where compiled programs are kept."""

from __future__ import annotations

import argparse
from typing import Any

from msa_jax import compilation


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add them; `loading_of` reads those of the bank."""
    group = parser.add_argument_group("how the bank is loaded")
    group.add_argument(
        "--content",
        choices=("device", "host", "disk"),
        default="device",
        help="where keys and values that are attended to lie; routing keys are on the device (default %(default)s)",
    )
    for name, what in (("key_dtype", "routing keys"), ("content_dtype", "keys and values")):
        group.add_argument(f"--{name}", choices=("int8",), help=f"quantise {what} while loading; default as stored")
    compilation.add_flag(group)


def loading_of(options: argparse.Namespace) -> dict[str, Any]:
    """Options of `msa_jax.bank.load`; from here on compiled programs are kept."""
    compilation.keep_programs(options.compiled)
    return dict(content=options.content, key_dtype=options.key_dtype, content_dtype=options.content_dtype)
