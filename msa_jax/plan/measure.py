"""What a program takes of each chip: by the compiler, or of its arguments by their shapes."""

from __future__ import annotations

import dataclasses
import math
import re
import time

import jax
import numpy as np

from msa_jax.cli.compilation import for_other_chips
from msa_jax.plan.programs import Program

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Usage:
    """GiB of one chip.

    Attributes:
      arguments, temporaries, output: on the chip. alias: output that takes the place of arguments.
      host: arguments and temporaries in host memory.
      needed: on the chip at once.
      by: "compiler", or "arithmetic" (temporaries then are an estimate).
      seconds: of tracing and compiling.
    """

    arguments: float | None = None
    temporaries: float | None = None
    output: float | None = None
    alias: float | None = None
    host: float | None = None
    needed: float | None = None
    by: str = "compiler"
    seconds: float | None = None


def arguments(program: Program) -> tuple[float, float]:
    """GiB on a chip and in its host's memory of a program's arguments, by their shapes and shardings."""
    chip = host = 0
    for x in jax.tree.leaves(program.args):
        if isinstance(x, jax.ShapeDtypeStruct):
            size = math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
            if x.sharding.memory_kind == "pinned_host":
                host += size
            else:
                chip += size
    return chip / GIB, host / GIB


def compiled(program: Program) -> Usage:
    """What the compiler says; of a program that it refuses as too large, `needed` alone, if it says that."""
    start = time.monotonic()
    lowered = program.lower()
    try:
        with for_other_chips():
            executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)([MG]) of", str(error))
        needed = used and float(used[1]) / (1024 if used[2] == "M" else 1)
        return Usage(needed=needed or math.inf, seconds=time.monotonic() - start)
    stats = executable.memory_analysis()
    sizes = dict(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        output=stats.output_size_in_bytes,
        alias=stats.alias_size_in_bytes,
        host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes + stats.host_output_size_in_bytes,
    )
    sizes["needed"] = sizes["arguments"] + sizes["temporaries"] + sizes["output"] - sizes["alias"]
    return Usage(**{name: size / GIB for name, size in sizes.items()}, seconds=time.monotonic() - start)
