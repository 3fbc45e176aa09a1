"""Names that are imported when they are first used, and what is not installed for them in one sentence."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

_BANK = ("orbax", "safetensors", "tensorstore", "tokenizers", "tqdm")

# What an extra of the installation adds, as modules; setup.cfg names the distributions that have them.
EXTRAS: dict[str, tuple[str, ...]] = {
    "bank": _BANK,
    "train": (*_BANK, "absl", "grain", "matplotlib", "ml_collections", "optax", "tensorboardX"),
    "baselines": ("bm25s", "scipy"),
    "serve": (*_BANK, "prometheus_client", "pydantic", "pydantic_core", "starlette", "uvicorn"),
}


def _missing(extra: str) -> str:
    """What is not installed of an extra and how to install it; empty if nothing is missing."""
    missing = [name for name in EXTRAS[extra] if name not in sys.modules and importlib.util.find_spec(name) is None]
    return missing and f"{', '.join(missing)} not installed: pip install 'msa-jax[{extra}]' adds it." or ""


def require_extra(extra: str) -> None:
    """Raises ImportError unless an extra of `EXTRAS` is installed; the sentence says how to install it."""
    if sentence := _missing(extra):
        raise ImportError(sentence)


def exit_without(extra: str, command: str) -> None:
    """End a command with that sentence and status 1 unless the extra is installed."""
    if sentence := _missing(extra):
        raise SystemExit(f"{command}: {sentence}")


def lazy(
    package: str, modules: Mapping[str, str], extras: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are imported when they are first used.

    Args:
      package: its `__name__`.
      modules: the module that holds each name.
      extras: the extra that a module needs, by module; modules that are not named need none.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = modules[name]
        if extras and module in extras:
            require_extra(extras[module])
        value = getattr(importlib.import_module(module), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *modules})
