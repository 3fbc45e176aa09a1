"""Uses every public name as a caller with a type checker would: `make lint` runs mypy over it. It is never run."""

import pathlib

import jax
from flax import nnx

import msa_jax
from msa_jax import (
    AttentionConfig,
    ConfigError,
    Context,
    MemoryBank,
    MemorySparseAttention,
    MemoryStore,
    MSAConfig,
    MSAError,
    MSATransformer,
    Route,
    Session,
)
from msa_jax.bank import BankDocument, BankSpec, DocumentEncoder
from msa_jax.inference import Answer


def version() -> str:
    return msa_jax.__version__


def layer(width: int) -> MemorySparseAttention:
    config = AttentionConfig(hidden_size=width, num_heads=4, num_kv_heads=2, head_dim=width // 4, chunk_size=16)
    return MemorySparseAttention(config, rngs=nnx.Rngs(0))


def model(folder: pathlib.Path) -> MSATransformer:
    config: MSAConfig = MSAConfig.from_checkpoint(folder)
    return MSATransformer(config, rngs=nnx.Rngs(0))


def keep(path: pathlib.Path, spec: BankSpec, encoder: DocumentEncoder) -> int:
    with MemoryStore.create(path, spec) as store:
        store.add([BankDocument(id="1", text="Rye bread")], encoder)
        return len(store)


def ask(bank: str, workdir: str, question: str) -> str:
    try:
        with Session.open(bank, workdir=workdir) as session:
            answer: Answer = session.ask(question)
            return answer.text
    except ConfigError as error:
        return str(error)
    except MSAError:
        raise


def size(bank: MemoryBank) -> int:
    return len(jax.tree.leaves(bank))


def read(model: MSATransformer, tokens: jax.Array, bank: MemoryBank, template: Context | None) -> jax.Array:
    return model.logits(model.prefill(tokens, template=template, read=Route(bank)).hidden)
