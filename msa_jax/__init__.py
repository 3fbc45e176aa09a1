"""Memory Sparse Attention (arXiv 2603.23516) in JAX."""

from msa_jax.bank.store import MemoryStore
from msa_jax.config import AttentionConfig, MSAConfig
from msa_jax.errors import ConfigError
from msa_jax.inference import Session
from msa_jax.layers import MemorySparseAttention
from msa_jax.memory import MemoryBank
from msa_jax.model import MSATransformer

__all__ = [
    "AttentionConfig",
    "ConfigError",
    "MSAConfig",
    "MSATransformer",
    "MemoryBank",
    "MemorySparseAttention",
    "MemoryStore",
    "Session",
]
