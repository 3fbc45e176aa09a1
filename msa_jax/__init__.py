"""Memory Sparse Attention (arXiv 2603.23516) in JAX.

Importing this loads nothing: each name is imported when it is first used, so that a program that embeds a layer pays
for that layer alone. docs/api.md says which names are stable.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msa_jax.bank.store import MemoryStore as MemoryStore
    from msa_jax.config import AttentionConfig as AttentionConfig
    from msa_jax.config import MSAConfig as MSAConfig
    from msa_jax.errors import ConfigError as ConfigError
    from msa_jax.errors import MSAError as MSAError
    from msa_jax.inference.session import Session as Session
    from msa_jax.layers.attention import MemorySparseAttention as MemorySparseAttention
    from msa_jax.memory.bank import MemoryBank as MemoryBank
    from msa_jax.model import MSATransformer as MSATransformer

__version__ = "0.1.0"  # setup.cfg takes it from here

_MODULES = {
    "AttentionConfig": "config",
    "ConfigError": "errors",
    "MSAConfig": "config",
    "MSAError": "errors",
    "MSATransformer": "model",
    "MemoryBank": "memory.bank",
    "MemorySparseAttention": "layers.attention",
    "MemoryStore": "bank.store",
    "Session": "inference.session",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
