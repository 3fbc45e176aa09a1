"""The question step of the 4B model with its content on the device, in host memory and on disk, compiled for TPUs.

Nothing is run, and parameters and banks are shapes alone: `python -m benchmarks.tiers compiled` prints the table.
"""

from __future__ import annotations

import dataclasses
import functools

from benchmarks import compiled as programs  # before JAX, whose platform it sets

import jax  # noqa: E402  isort: skip
from flax import nnx  # noqa: E402

from msa_jax.cli.compilation import for_other_chips
from msa_jax.config import MSAConfig  # noqa: E402
from msa_jax.context import Context, KeyValues, Reuse, Route  # noqa: E402
from msa_jax.memory import ContentSource, DocumentLayout, MemoryBank, StoredContent, tiers  # noqa: E402
from msa_jax.memory.selection import Selection
from msa_jax.model import MSATransformer  # noqa: E402

# Chips of the smallest machine that holds 100M tokens with content in host memory, and 64 chunks (4K tokens) as the
# longest document.
SHARES = {"v5e": 8, "v5p": 4, "v6e": 8}
# What XLA leaves of 16, 95 and 32 GB of HBM.
HBM = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
TOTAL, LONGEST, CHUNKS_A_DOCUMENT = 1_562_500, 64, 16
GIB, MIB = 2**30, 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of the 4B model on one chip."""

    tier: str
    chunks: int
    keys: str = "bfloat16"
    content: str = "bfloat16"
    step: str = "prefill"
    questions: int = 1

    @property
    def name(self) -> str:
        tokens = self.chunks * 64 / 1e6
        what = f"{self.step} of {self.questions}" if self.questions > 1 else self.step
        return f"{self.tier:7}{tokens:6.1f}M tokens, keys {self.keys:9}, content {self.content:9}, {what}"


def share(chip: str) -> int:
    """Chunks of one chip's part of 100M tokens, padded as banks are."""
    return -(-TOTAL // SHARES[chip] // 128) * 128


def cases(chip: str) -> list[Case]:
    """Cases of a chip: its share of 100M tokens in every tier, and the most that it holds with content elsewhere."""
    part = share(chip)
    most = {"v5e": 327_680, "v5p": 4_194_304, "v6e": 1_179_648}[chip]
    int8 = dict(keys="int8", content="int8")
    return [
        Case("device", part),
        Case("device", part, **int8),
        Case("host", part, keys="int8"),
        Case("host", part, **int8),
        Case("host", part, **int8, questions=8),
        Case("host", part, **int8, step="decode"),
        Case("host", part, **int8, step="fetch"),
        Case("disk", part, keys="int8"),
        Case("host", most, **int8),
    ]


@functools.cache
def _parameters():
    config = MSAConfig.preset("qwen3_4b", dtype="bfloat16", param_dtype="bfloat16")
    return config, *nnx.split(nnx.eval_shape(lambda: MSATransformer(config, rngs=nnx.Rngs(0))))


def program(case: Case, chip: str):
    """The step of a case and its arguments as shapes."""
    config, graph, state = _parameters()
    mesh = programs.mesh_of(chip)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
    layers, heads, width = len(config.router_layers), config.num_kv_heads, config.head_dim
    documents = array((case.chunks // CHUNKS_A_DOCUMENT,), "int32")
    layout = DocumentLayout(array((case.chunks,), "int32"), documents, documents, max_length=LONGEST)
    scale = array((layers, heads, case.chunks), "float32") if case.content == "int8" else None
    bank = dict(
        routing_keys=array((layers, case.chunks, config.router_width), case.keys),
        key_scale=array((layers, case.chunks), "float32") if case.keys == "int8" else None,
        content_k_scale=scale, content_v_scale=scale, content_k=None, content_v=None, layout=layout,
    )  # fmt: skip
    shape = (layers, case.chunks, heads, width)
    if case.tier == "disk":
        bank["stored"] = StoredContent(array((), "int32"), ContentSource(None, shape, case.content))
    else:
        there = whole if case.tier == "device" else whole.with_memory_kind("pinned_host")
        content = jax.ShapeDtypeStruct(shape, case.content, sharding=there)
        bank |= dict(content_k=content, content_v=content)
    args = dict(state=jax.tree.map(lambda x: array(x.shape, x.dtype), state), bank=MemoryBank(**bank))
    b, k = case.questions, config.top_k_documents
    ranges = array((layers, b, k), "int32")
    selection = Selection(documents=ranges, scores=array((layers, b, k), "float32"), starts=ranges, lengths=ranges)
    if case.step == "fetch":
        return lambda state, bank, selection: tiers.fetch(bank, selection), args | dict(selection=selection)

    def prefill(state, tokens, bank):
        output = nnx.merge(graph, state).prefill(tokens, read=Route(bank))
        return output.hidden, output.own, output.selection

    def decode(state, tokens, context, bank, selection):
        return nnx.merge(graph, state).decode(tokens, context, read=Reuse(bank, selection))

    if case.step == "prefill":
        return prefill, args | dict(tokens=array((b, 64), "int32"))
    cache, one = array((config.num_layers, b, 512, heads, width), "bfloat16"), array((b,), "int32")
    return decode, args | dict(tokens=one, context=Context(KeyValues(cache, cache), one, one), selection=selection)


def compiled(case: Case, chip: str) -> dict[str, float | str]:
    """Bytes that the compiled step takes, or that it does not fit."""
    function, args = program(case, chip)
    donate = ("context",) if case.step == "decode" else ()
    with for_other_chips(), jax.set_mesh(programs.mesh_of(chip)):
        try:
            # A bank's keys are there whether a step reads them or not.
            executable = jax.jit(function, donate_argnames=donate, keep_unused=True).lower(**args).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return dict(error="does not fit")
    stats = executable.memory_analysis()
    return dict(
        arguments_gib=round(stats.argument_size_in_bytes / GIB, 2),
        temporaries_mib=round(stats.temp_size_in_bytes / MIB, 1),
        host_gib=round(stats.host_argument_size_in_bytes / GIB, 2),
        host_temporaries_mib=round(stats.host_temp_size_in_bytes / MIB, 1),
    )


def table(chips: list[str]) -> dict:
    """Compile all cases, printing a line each."""
    rows = {}
    for chip in chips:
        if (missing := programs.available(chip)) is not None:
            print(f"{chip}: {missing}")
            continue
        print(f"{chip}: {HBM[chip]} GiB; 100M tokens are {SHARES[chip]} chips' work")
        for case in cases(chip):
            sizes = compiled(case, chip)
            rows.setdefault(chip, []).append(dataclasses.asdict(case) | sizes)
            shown = sizes.get("error") or ", ".join(f"{name} {value}" for name, value in sizes.items())
            print(f"  {case.name:75}{shown}", flush=True)
    return rows
