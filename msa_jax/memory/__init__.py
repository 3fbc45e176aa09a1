"""The memory that layers read: its arrays, where its content lies, and what is selected from it."""

from msa_jax.memory.bank import (
    LAYER_ARRAYS,
    ChunkStates,
    ContentSource,
    DocumentLayout,
    LayerMemory,
    MemoryBank,
    StoredContent,
)
from msa_jax.memory.selection import Selection

__all__ = [
    "LAYER_ARRAYS",
    "ChunkStates",
    "ContentSource",
    "DocumentLayout",
    "LayerMemory",
    "MemoryBank",
    "Selection",
    "StoredContent",
]
