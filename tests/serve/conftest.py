"""A small model of random weights and a bank on disk, for the server of a real session."""

import pytest
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.bank import BankSpec, DocumentEncoder, MemoryStore
from msa_jax.checkpoints.pretrained import save_model
from msa_jax.data.tokenizer import Tokenizer
from tests.serve.fakes import DOCUMENTS


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Folders of a checkpoint and of a bank of `DOCUMENTS`."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = Tokenizer.train([*(d.text for d in DOCUMENTS), "question"] * 9, vocab_size=340)
    config = MSAConfig.preset(
        "tiny", vocab_size=tokenizer.vocab_size, hidden_size=16, head_dim=4, mlp_size=8, num_layers=1, chunk_size=8,
        router_layers=(0,),
    )  # fmt: skip
    model = MSATransformer(config, rngs=nnx.Rngs(0))
    save_model(model, folder / "model")
    tokenizer.save(folder / "model")
    with MemoryStore.create(folder / "bank", BankSpec.of(model, tokenizer)) as store:
        store.add(DOCUMENTS, DocumentEncoder(model, tokenizer, row_len=64, rows_per_step=2))
    return folder / "model", folder / "bank"
