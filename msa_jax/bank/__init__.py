"""The memory bank: encoding documents into it, keeping it on disk, loading it onto a device."""

from msa_jax.bank.document_encoder import DocumentEncoder
from msa_jax.bank.encoder import encode_bank
from msa_jax.bank.ingest import Report
from msa_jax.bank.loading import LoadedBank, load
from msa_jax.bank.manifest import BankSpec
from msa_jax.bank.parts import add_part
from msa_jax.bank.quantization import quantize
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import BankDocument
from msa_jax.errors import BankError
from msa_jax.memory import MemoryBank

__all__ = [
    "BankDocument",
    "BankError",
    "BankSpec",
    "DocumentEncoder",
    "LoadedBank",
    "MemoryBank",
    "MemoryStore",
    "Report",
    "add_part",
    "encode_bank",
    "load",
    "quantize",
]
