"""Memory Sparse Attention (arXiv 2603.23516) in JAX.

Importing this loads nothing: each name is imported when it is first used, so that a program that embeds a layer pays
for that layer alone. docs/api.md says which names are stable.
"""

from typing import TYPE_CHECKING

from msa_jax.importing import lazy

if TYPE_CHECKING:
    from msa_jax.bank.store import MemoryStore as MemoryStore
    from msa_jax.config import AttentionConfig as AttentionConfig
    from msa_jax.config import MSAConfig as MSAConfig
    from msa_jax.context import Context as Context
    from msa_jax.context import Resume as Resume
    from msa_jax.context import Reuse as Reuse
    from msa_jax.context import Route as Route
    from msa_jax.errors import ConfigError as ConfigError
    from msa_jax.errors import MSAError as MSAError
    from msa_jax.inference.session import Session as Session
    from msa_jax.layers.attention import MemorySparseAttention as MemorySparseAttention
    from msa_jax.memory.bank import MemoryBank as MemoryBank
    from msa_jax.model import MSATransformer as MSATransformer

__version__ = "0.1.0"  # setup.cfg takes it from here

_MODULES = {
    "AttentionConfig": "msa_jax.config",
    "ConfigError": "msa_jax.errors",
    "Context": "msa_jax.context",
    "MSAConfig": "msa_jax.config",
    "MSAError": "msa_jax.errors",
    "MSATransformer": "msa_jax.model",
    "MemoryBank": "msa_jax.memory.bank",
    "MemorySparseAttention": "msa_jax.layers.attention",
    "MemoryStore": "msa_jax.bank.store",
    "Resume": "msa_jax.context",
    "Reuse": "msa_jax.context",
    "Route": "msa_jax.context",
    "Session": "msa_jax.inference.session",
}

__all__ = [*_MODULES, "__version__"]
__getattr__, __dir__ = lazy(__name__, _MODULES, {"msa_jax.bank.store": "bank", "msa_jax.inference.session": "bank"})
