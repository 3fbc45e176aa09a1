"""The memory bank: encoding documents into it, keeping it on disk, loading it onto a device."""

from typing import TYPE_CHECKING

from msa_jax.importing import lazy

if TYPE_CHECKING:
    from msa_jax.bank.document_encoder import DocumentEncoder as DocumentEncoder
    from msa_jax.bank.encoder import encode_bank as encode_bank
    from msa_jax.bank.ingest import Report as Report
    from msa_jax.bank.loading import LoadedBank as LoadedBank
    from msa_jax.bank.loading import load as load
    from msa_jax.bank.manifest import BankSpec as BankSpec
    from msa_jax.bank.parts import add_part as add_part
    from msa_jax.bank.quantization import quantize as quantize
    from msa_jax.bank.store import MemoryStore as MemoryStore
    from msa_jax.bank.table import BankDocument as BankDocument
    from msa_jax.errors import BankError as BankError
    from msa_jax.memory import MemoryBank as MemoryBank

_MODULES = {
    "BankDocument": "msa_jax.bank.table",
    "BankError": "msa_jax.errors",
    "BankSpec": "msa_jax.bank.manifest",
    "DocumentEncoder": "msa_jax.bank.document_encoder",
    "LoadedBank": "msa_jax.bank.loading",
    "MemoryBank": "msa_jax.memory",
    "MemoryStore": "msa_jax.bank.store",
    "Report": "msa_jax.bank.ingest",
    "add_part": "msa_jax.bank.parts",
    "encode_bank": "msa_jax.bank.encoder",
    "load": "msa_jax.bank.loading",
    "quantize": "msa_jax.bank.quantization",
}

__all__ = [*_MODULES]
__getattr__, __dir__ = lazy(__name__, _MODULES, dict.fromkeys(_MODULES.values(), "bank"))
