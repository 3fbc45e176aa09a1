"""The memory bank: encoding documents into it."""

from msa_jax.bank.encoder import encode_bank
from msa_jax.memory import MemoryBank

__all__ = ["MemoryBank", "encode_bank"]
