"""Compiled programs kept on disk, so that a command that is started again need not compile them again."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import pathlib
import platform
from collections.abc import Iterator

import jax


def _machine() -> str:
    """A short name of this kind of processor: programs for a CPU use what it can do, which another may not."""
    told = [platform.machine(), platform.processor()]
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        told += sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "model name"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--compiled`, the folder for `keep_programs`."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    parser.add_argument(
        "--compiled",
        metavar="DIR",
        default=str(pathlib.Path(home) / "msa_jax"),
        help="keep compiled programs there for the next start; '' keeps none; default %(default)s",
    )


def keep_programs(folder: str) -> None:
    """Keep what is compiled from now on in `folder`, apart for each kind of processor; empty keeps nothing.

    A folder that cannot be written costs the time to compile and nothing else.
    """
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder) / _machine()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def for_other_chips() -> Iterator[None]:
    """Keep nothing of what is compiled within: programs for chips that are not here could not be loaded again."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)
