"""Asking the memory: generation, and Memory Interleave around it."""

from msa_jax.inference.generate import Context, Generation, generate
from msa_jax.inference.interleave import Answer, interleave

__all__ = ["Answer", "Context", "Generation", "generate", "interleave"]
