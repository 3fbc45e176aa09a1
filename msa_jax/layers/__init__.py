"""Layers of the MSA transformer; `MemorySparseAttention` is made to be embedded in other models."""

from msa_jax.layers.attention import AttentionOutput, MemorySparseAttention, SelfAttention

__all__ = ["AttentionOutput", "MemorySparseAttention", "SelfAttention"]
