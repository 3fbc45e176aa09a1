"""What each kernel takes of a TPU: compiled by the real compiler, on a machine without one.

    python -m benchmarks.tpu [--chips v5e,v5p,v6e] [--out benchmarks/results/tpu_memory.json]

Needs libtpu (`make tpu`). Prints, for each chip, kernel and size, the bytes per chip of arguments, temporaries and
outputs, and how long the compiler took. Nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu asks a metadata server what machine it is on, and there is none.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from pallas_kernels import chunk_scores, gather_attention  # noqa: E402

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclasses.dataclass(frozen=True)
class Routing:
    """A call of `chunk_scores`: 4B is M 1024; 1,562,500 chunks are 100M tokens."""

    b: int
    t: int
    m: int
    c: int
    query: str = "bfloat16"
    keys: str = "bfloat16"
    backward: bool = False

    @property
    def kernels(self) -> tuple[str, ...]:
        grads = ("chunk_scores_grad_query", "chunk_scores_grad_keys") if self.backward else ()
        return ("chunk_scores_forward", *grads)

    def program(self):
        arrays = dict(
            query=((self.b, self.t, self.m), self.query),
            keys=((self.c, self.m), self.keys),
            query_mask=((self.b, self.t), "bool"),
        )
        if self.keys == "int8":
            arrays["key_scale"] = ((self.c,), "float32")
        if self.query == "int8":
            arrays["query_scale"] = ((self.b, self.t), "float32")
        score = functools.partial(chunk_scores, implementation="tpu")
        if not self.backward:
            return score, arrays

        def pulled(query, keys, query_mask, grad):
            scores, vjp = jax.vjp(functools.partial(score, query_mask=query_mask), query, keys)
            return scores, vjp(grad)

        return pulled, arrays | dict(grad=((self.b, self.c), "float32"))


@dataclasses.dataclass(frozen=True)
class Attention:
    """A call of `gather_attention`: 4B is H 32, K 8, D 128."""

    b: int
    t: int
    s: int
    h: int
    kv: int
    d: int
    c: int
    longest: int
    dtype: str = "bfloat16"
    bank: str = "bfloat16"
    backward: bool = False

    @property
    def kernels(self) -> tuple[str, ...]:
        bank = () if self.bank == "int8" else ("gather_attention_grad_bank",)
        grads = ("gather_attention_grad_query", "gather_attention_grad_own", *bank) if self.backward else ()
        return ("gather_attention_forward", *grads)

    def program(self):
        own, bank, k = (self.b, self.s, self.kv, self.d), (self.c, self.kv, self.d), 16
        arrays = dict(
            q=((self.b, self.t, self.h, self.d), self.dtype),
            k=(own, self.dtype),
            v=(own, self.dtype),
            bank_k=(bank, self.bank),
            bank_v=(bank, self.bank),
            bias=((self.b, k, self.h), "float32"),
        )
        rest = dict(starts=((self.b, k), "int32"), lengths=((self.b, k), "int32"), mask=((self.b, self.s), "bool"))
        if self.bank == "int8":
            rest |= dict.fromkeys(("bank_k_scale", "bank_v_scale"), ((self.kv, self.c), "float32"))
        attend = functools.partial(gather_attention, max_length=self.longest, implementation="tpu")
        if not self.backward:
            return attend, arrays | rest
        names = [name for name, (_, dtype) in arrays.items() if dtype != "int8"]

        def pulled(grad_out, grad_lse, **kwargs):
            fixed = {name: x for name, x in kwargs.items() if name not in names}
            floats = {name: kwargs[name] for name in names}
            outs, vjp = jax.vjp(lambda floats: attend(**floats, **fixed), floats)
            return outs, vjp((grad_out, grad_lse))

        grads = dict(grad_out=arrays["q"], grad_lse=((self.b, self.t, self.h), "float32"))
        return pulled, arrays | rest | grads


CASES = {
    "routing 4B, 100M tokens": Routing(1, 64, 1024, 1_562_500),
    "routing 4B, 100M tokens, int8 keys": Routing(1, 64, 1024, 1_562_500, keys="int8"),
    "routing 4B, 100M tokens, int8 both": Routing(1, 64, 1024, 1_562_500, query="int8", keys="int8"),
    "routing 4B, decoding 64 questions": Routing(64, 1, 1024, 1_562_500),
    "routing 4B, widest": Routing(64, 512, 2048, 65_536),
    "routing 4B, training": Routing(48, 64, 1024, 16_384, backward=True),
    "routing tiny, training": Routing(48, 64, 64, 4_096, "float32", "float32", backward=True),
    "attention 4B, prefill": Attention(1, 64, 64, 32, 8, 128, 400_000, 256),
    "attention 4B, prefill, int8": Attention(1, 64, 64, 32, 8, 128, 400_000, 256, bank="int8"),
    "attention 4B, decoding 32 questions": Attention(32, 1, 4096, 32, 8, 128, 400_000, 256),
    "attention 4B, 512 tokens": Attention(8, 512, 1024, 32, 8, 128, 100_000, 32),
    "attention 4B, training": Attention(48, 64, 64, 32, 8, 128, 16_384, 32, backward=True),
    "attention tiny, training": Attention(48, 64, 64, 4, 2, 32, 4_096, 8, "float32", "float32", backward=True),
    "attention tiny, decoding": Attention(32, 1, 128, 4, 2, 32, 65_536, 8, "float32", "float32"),
}


@functools.cache
def mesh_of(chip: str) -> jax.sharding.Mesh:
    """One device of a chip that need not be there."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu")
    return jax.sharding.Mesh(np.array(topology.devices)[:1], ("x",))


def compiled(case: Routing | Attention, chip: str):
    """The executable of a case on a chip."""
    mesh = mesh_of(chip)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    function, arrays = case.program()
    args = {name: jax.ShapeDtypeStruct(*array, sharding=whole) for name, array in arrays.items()}
    with jax.set_mesh(mesh):
        return jax.jit(lambda args: function(**args)).lower(args).compile()


def memory(executable) -> dict[str, int]:
    """Bytes on the chip of arguments, temporaries and outputs."""
    stats = executable.memory_analysis()
    return dict(
        arguments=stats.argument_size_in_bytes, temporaries=stats.temp_size_in_bytes, outputs=stats.output_size_in_bytes
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(TOPOLOGIES))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/tpu_memory.json"))
    options = parser.parse_args()
    import libtpu

    results = dict(jax=jax.__version__, libtpu=libtpu.__version__, unit="MiB", chips={})
    print(f"{'chip':5}{'case':38}{'arguments':>12}{'temporaries':>13}{'outputs':>10}{'seconds':>9}")
    for chip in options.chips.split(","):
        rows = results["chips"].setdefault(chip, {})
        for name, case in CASES.items():
            start = time.monotonic()
            sizes = {what: round(size / 2**20, 2) for what, size in memory(compiled(case, chip)).items()}
            seconds = time.monotonic() - start
            rows[name] = sizes | dict(shape={f.name: getattr(case, f.name) for f in dataclasses.fields(case)})
            print(f"{chip:5}{name:38}{sizes['arguments']:12}{sizes['temporaries']:13}{sizes['outputs']:10}{seconds:9.1f}")
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
