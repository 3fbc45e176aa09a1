"""The kernels compiled by the real compilers for chips that are not here: TPUs (`make tpu`) and the H200.

The CUDA compiler comes with `pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc`, of the version of JAX.
"""

import functools
import os

import pytest

# Before libtpu is loaded: there is no metadata server to ask, and other processes may compile as well.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks import compiled as programs  # noqa: E402
from msa_jax.cli.compilation import for_other_chips
from msa_jax.config import MSAConfig  # noqa: E402
from msa_jax.context import Route  # noqa: E402
from msa_jax.memory import DocumentLayout, MemoryBank  # noqa: E402
from msa_jax.model import MSATransformer  # noqa: E402
from pallas_kernels import tpu_chip  # noqa: E402
from pallas_kernels.chunk_scores import tpu as chunk_scores_tpu  # noqa: E402
from pallas_kernels.gather_attention import tpu as gather_attention_tpu  # noqa: E402
from pallas_kernels.gather_attention.reference import Operands  # noqa: E402

pytestmark = pytest.mark.usefixtures("optimised")
MIB = 2**20
# One for each kernel, on one chip: the rest of the matrix is slow.
QUICK = ("routing 4B, training", "attention 4B, prefill, int8", "attention 4B, training")
compiled = functools.cache(programs.compiled)


def on(chips, cases, quick=QUICK):
    """Parameters of cases on chips, those without a compiler here skipped."""

    def marks(name, chip):
        missing = programs.available(chip)
        skip = [] if missing is None else [pytest.mark.skip(missing)]
        return skip + [pytest.mark.slow] * (chip != "v5e" or name not in quick)

    return pytest.mark.parametrize(
        ("name", "chip"), [pytest.param(name, chip, marks=marks(name, chip)) for chip in chips for name in cases]
    )


@on(programs.CHIPS, programs.CASES)
def test_the_executable_holds_the_kernels(name, chip):
    case = programs.CASES[name]
    executable = compiled(case, chip)
    text = executable.as_text()
    if chip != "h200":
        for kernel in case.tpu_kernels:
            assert kernel in text, f"no {kernel} in the executable"
    target = "mosaic_gpu" if chip == "h200" else "tpu_custom_call"
    assert text.count(f'custom_call_target="{target}') == len(case.tpu_kernels)
    sizes = programs.memory(executable)
    print(f"{chip}: {name}: " + ", ".join(f"{what} {size / MIB:.1f} MiB" for what, size in sizes.items()))


@on(programs.TPUS, [name for name in programs.CASES if name.startswith("routing 4B")])
def test_routing_takes_the_keys_and_what_it_returns(name, chip):
    case = programs.CASES[name]
    keys = case.c * case.m * (1 if case.keys == "int8" else 2)
    sizes = programs.memory(compiled(case, chip))
    assert sizes["arguments"] < keys + 8 * case.b * case.c + 130 * MIB
    # Nothing of size B x T x C. At most the scores in other layouts; in training a few more of size B x C.
    assert sizes["temporaries"] <= 4 * case.b * case.c * (8 if case.backward else 2) + MIB


@on(programs.CHIPS, ["attention 4B, prefill", "attention 4B, prefill, int8", "attention 4B, decoding 32 questions"])
def test_neither_the_bank_nor_a_cache_is_copied(name, chip):
    # 1.5 GiB of bank, 512 MiB of cache.
    assert programs.memory(compiled(programs.CASES[name], chip))["temporaries"] < 16 * MIB


def budget_of(case) -> int:
    """What the kernels say that a case takes of VMEM."""
    function, arrays = case.program("tpu")
    args = {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}
    if isinstance(case, programs.Routing):
        blocks = chunk_scores_tpu.blocks_of(args["query"], args["keys"])
        return blocks.vmem_bytes(case.m, args["query"].dtype.itemsize, args["keys"].dtype.itemsize)
    operands = Operands(**{name: args.get(name) for name in Operands._fields})
    blocks = gather_attention_tpu.blocks_of(operands, case.longest)
    return blocks.vmem_bytes(case.kv, case.d, operands.q.dtype.itemsize, operands.bank_k.dtype.itemsize)


@on(["v5e"], programs.CASES, quick=QUICK[:2])
def test_the_description_of_vmem_bounds_what_the_compiler_uses(name, chip, monkeypatch):
    case = programs.CASES[name]
    with jax.set_mesh(programs.mesh_of(chip)):
        described = budget_of(case)
        monkeypatch.setattr(tpu_chip, "vmem_budget", lambda: described)
        # It is asked before the longest document is known, and so fears for more.
        monkeypatch.setattr(gather_attention_tpu, "unsupported", lambda **_: None)
        assert budget_of(case) == described
    jax.clear_caches()
    programs.compiled(case, chip)
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.skipif(programs.available("v5p") is not None, reason=str(programs.available("v5p")))
def test_the_question_step_of_the_4b_model_copies_no_layer_of_its_bank():
    config = MSAConfig.preset("qwen3_4b", dtype="bfloat16", param_dtype="bfloat16")
    mesh = programs.mesh_of("v5p")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
    graph, state = nnx.split(nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda x: array(x.shape, x.dtype), state)
    chunks, layers = 262_144, len(config.router_layers)
    content = array((layers, chunks, config.num_kv_heads, config.head_dim), "bfloat16")
    documents = array((chunks // 16,), "int32")
    layout = DocumentLayout(array((chunks,), "int32"), documents, documents, max_length=64)
    bank = MemoryBank(array((layers, chunks, config.router_width), "bfloat16"), content, content, layout)

    def step(state, tokens, bank):
        output = nnx.merge(graph, state).prefill(tokens, read=Route(bank))
        return output.hidden, output.own, output.selection

    with for_other_chips(), jax.set_mesh(mesh):
        executable = jax.jit(step).lower(state, array((1, 64), "int32"), bank).compile()
    assert executable.as_text().count('custom_call_target="tpu_custom_call"') == 2
    # A layer has 512 MiB of routing keys and twice that of content.
    assert programs.memory(executable)["temporaries"] < 128 * MIB
