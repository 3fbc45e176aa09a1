"""Embedding costs nothing: what an import loads and defines, and a host program with flags of its own."""

import importlib
import re
import subprocess
import sys

import pytest

import msa_jax

# What each import adds to JAX and Flax, in one process: the first that adds too much is named.
IMPORTS = """
import sys

import flax.nnx, jax
from absl import flags

heavy = {"grain", "orbax", "tensorboardX", "tensorstore", "tokenizers", "matplotlib", "ml_collections", "starlette"}
assert not heavy & set(sys.modules), "JAX and Flax load more than they did"
defined = set(flags.FLAGS)
for statement in (
    "import pallas_kernels",
    "import pallas_kernels.chunk_scores.api, pallas_kernels.gather_attention.api",
    "import msa_jax",
    "from msa_jax.layers import MemorySparseAttention",
    "from msa_jax import MSAConfig, MSATransformer, MemoryBank",
):
    exec(statement)
    assert not heavy & set(sys.modules), (statement, sorted(heavy & set(sys.modules)))
    assert set(flags.FLAGS) == defined, (statement, set(flags.FLAGS) - defined)
"""

# A program with flags of the names that `train.py` has, which uses a model and a store.
HOST = """
import sys

from absl import app, flags

for name in ("coordinator", "config", "workdir"):
    flags.DEFINE_string(name, "mine", "the host's")
for name in ("process_id", "num_processes"):
    flags.DEFINE_integer(name, 7, "the host's")
flags.DEFINE_bool("distributed", True, "the host's")


def main(_):
    from flax import nnx

    import msa_jax
    from msa_jax.bank import BankSpec
    from msa_jax.data import Tokenizer

    config = msa_jax.MSAConfig.preset("tiny", vocab_size=340, num_layers=1, router_layers=(0,))
    model = nnx.jit(lambda: msa_jax.MSATransformer(config, rngs=nnx.Rngs(0)))()
    tokenizer = Tokenizer.train(["some words of a text"], vocab_size=340)
    spec = BankSpec.of(model, tokenizer)
    with msa_jax.MemoryStore.create(sys.argv[1], spec) as store:
        assert len(store) == 0 and store.spec == spec
    assert flags.FLAGS.process_id == 3 and flags.FLAGS.coordinator == "mine" and flags.FLAGS.distributed


app.run(main)
"""


def run(code: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports_load_no_library_of_the_commands_and_define_no_flag():
    run(IMPORTS)


def test_a_host_program_keeps_its_flags(tmp_path):
    run(HOST, str(tmp_path / "bank"), "--process_id=3")


def test_public_names_resolve_and_are_listed():
    assert set(msa_jax.__all__) <= set(dir(msa_jax))
    for name in msa_jax.__all__:
        assert getattr(msa_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        msa_jax.nosuch  # noqa: B018


def test_the_page_of_public_names_is_complete_and_true(root):
    """Every public name stands in the table, and what stands there is."""
    page = (root / "docs/api.md").read_text()
    table = page[page.index("## Stable") : page.index("## May change")]
    named = set()
    for line in table.splitlines()[3:]:
        names = re.findall(r"`([\w.]+)`", line.split("|")[1]) if line.startswith("|") else []
        module = names.pop(0) if names and "`:" in line else None
        for name in names:
            home, _, attribute = name.rpartition(".") if module is None else (module, "", name)
            assert hasattr(importlib.import_module(home), attribute), name
            named.add(f"{home}.{attribute}")
    assert {f"msa_jax.{name}" for name in msa_jax.__all__ if name != "__version__"} <= named
    for package in re.findall(r"`(msa_jax\.\w+)`", page[page.index("## May change") : page.index("## Install")]):
        module = importlib.import_module(package)
        assert all(hasattr(module, name) for name in module.__all__)
