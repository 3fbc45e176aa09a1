"""What each kernel takes of a TPU or GPU: compiled by the real compilers, on a machine without one.

    python -m benchmarks.compiled [--chips v5e,v5p,v6e,h200] [--out benchmarks/results/compiled_memory.json]

TPUs need libtpu (`make tpu`). The H200 needs `pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc`, of the
version of JAX. Prints, for each chip, kernel and size, the bytes of arguments, temporaries and outputs on the chip,
and how long the compiler took. Nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu asks a metadata server what machine it is on, and there is none.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.measure import write_json  # noqa: E402
from msa_jax.cli.compilation import for_other_chips  # noqa: E402
from pallas_kernels import chunk_scores, gather_attention  # noqa: E402

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CHIPS = (*TPUS, "h200")
# What the CUDA compiler of XLA asks of a device, by the vendor's data sheet of the H200.
H200 = """
platform_name: "CUDA"  device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 8 }  runtime_version { major: 13 minor: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  device_memory_size: 141000000000  memory_bandwidth: 4800000000000  l2_cache_size: 52428800
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
}
"""


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
    def tpu_kernels(self) -> tuple[str, ...]:
        grads = ("chunk_scores_grad_query", "chunk_scores_grad_keys") if self.backward else ()
        return ("chunk_scores_forward", *grads)

    def program(self, implementation: str):
        arrays = dict(
            query=((self.b, self.t, self.m), self.query),
            keys=((self.c, self.m), self.keys),
            query_mask=((self.b, self.t), "bool"),
        )
        if self.keys == "int8":
            arrays["key_scale"] = ((self.c,), "float32")
        if self.query == "int8":
            arrays["query_scale"] = ((self.b, self.t), "float32")
        score = functools.partial(chunk_scores, implementation=implementation)
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
    def tpu_kernels(self) -> tuple[str, ...]:
        bank = () if self.bank == "int8" else ("gather_attention_grad_bank",)
        grads = ("gather_attention_grad_query", "gather_attention_grad_own", *bank) if self.backward else ()
        return ("gather_attention_forward", *grads)

    def program(self, implementation: str):
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
        attend = functools.partial(gather_attention, max_length=self.longest, implementation=implementation)
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


def available(chip: str) -> str | None:
    """Why programs for a chip cannot be compiled here, or None."""
    if chip != "h200":
        return None if importlib.util.find_spec("libtpu") else "libtpu is not installed: `make tpu` installs it."
    names = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13", "nvidia.cu13")
    if all(_found(name) for name in names):
        return None
    return "the CUDA compiler is not installed: `pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc`."


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def mesh_of(chip: str) -> jax.sharding.Mesh:
    """One device of a chip that need not be there."""
    from jax.experimental import topologies

    if chip == "h200":
        (tools,) = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
        os.environ["PATH"] = f"{tools}/bin:{os.environ['PATH']}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={tools}"
        one = "1x1x1"
        topology = topologies.get_topology_desc(one, platform="cuda", target_config=H200, topology=one)
    else:
        topology = topologies.get_topology_desc(TPUS[chip], platform="tpu")
    return jax.sharding.Mesh(np.array(topology.devices)[:1], ("x",))


def compiled(case: Routing | Attention, chip: str):
    """The executable of a case on a chip."""
    mesh = mesh_of(chip)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    function, arrays = case.program("gpu" if chip == "h200" else "tpu")
    args = {name: jax.ShapeDtypeStruct(*array, sharding=whole) for name, array in arrays.items()}
    with for_other_chips(), jax.set_mesh(mesh):
        return jax.jit(lambda args: function(**args)).lower(args).compile()


def memory(executable) -> dict[str, int]:
    """Bytes on the chip of arguments, temporaries and outputs."""
    stats = executable.memory_analysis()
    return dict(
        arguments=stats.argument_size_in_bytes, temporaries=stats.temp_size_in_bytes, outputs=stats.output_size_in_bytes
    )


def _installed(distribution: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=distribution))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/compiled_memory.json"))
    options = parser.parse_args()
    versions = {n: importlib.metadata.version(n) for n in ("jax", "libtpu", "nvidia-cuda-nvcc") if _installed(n)}
    results = dict(versions=versions, unit="MiB", chips={})
    print(f"{'chip':5}{'case':38}{'arguments':>12}{'temporaries':>13}{'outputs':>10}{'seconds':>9}")
    for chip in options.chips.split(","):
        if (missing := available(chip)) is not None:
            print(f"{chip}: {missing}")
            continue
        rows = results["chips"].setdefault(chip, {})
        for name, case in CASES.items():
            start = time.monotonic()
            sizes = {what: round(size / 2**20, 2) for what, size in memory(compiled(case, chip)).items()}
            seconds = time.monotonic() - start
            rows[name] = sizes | dict(shape={f.name: getattr(case, f.name) for f in dataclasses.fields(case)})
            print(f"{chip:5}{name:38}{sizes['arguments']:12}{sizes['temporaries']:13}{sizes['outputs']:10}{seconds:9.1f}")
    write_json(options.out, results)


if __name__ == "__main__":
    main()
