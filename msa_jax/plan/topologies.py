"""Machines by name: "v5e-16", "v5p-16", "v6e-8" (TPUs, which the compiler knows), "8xh100" (GPUs, by arithmetic)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re

import jax

from msa_jax.errors import ConfigError
from msa_jax.sharding import AXES, MeshConfig

# Chips by grid, as libtpu names them. Those of v5e and v6e count chips.
_GRIDS = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# Those of v5p count TensorCores as Google's accelerator types do, two a chip; JAX sees a chip as one device.
_V5P = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of chip.

    Attributes:
      memory: GiB of HBM: of TPUs what XLA leaves of 16, 95 and 32 GB, of GPUs what the driver shows.
      host: GiB of host memory for each chip, of the smallest machine type of the maker's; None: it differs.
      sizes: grids by the number in the name; None for GPUs, of any number.
    """

    memory: float
    host: float | None = None
    sizes: dict[int, str] | None = None


KINDS = {
    "v5e": Kind(15.75, 44.0, _GRIDS),
    "v5p": Kind(95.74, 104.0, _V5P),
    "v6e": Kind(31.25, 164.0, _GRIDS),
    "a100": Kind(79.3),
    "a800": Kind(79.3),
    "h100": Kind(79.6),
    "h200": Kind(140.4),
}


class GridError(ConfigError):
    """A mesh that does not lie on the grid of chips."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips of one kind.

    Attributes:
      name: as it was asked for.
      kind: a name of `KINDS`.
      chips: JAX devices.
    """

    name: str
    kind: str
    chips: int

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Of a name such as "v5e-16" or "8xh100".

        Raises:
          ConfigError: nobody knows it.
        """
        found = re.fullmatch(r"(?:(\d+)x([a-z]\w+)|([a-z]\w+)-(\d+))", name.strip().lower())
        kind = found and (found[2] or found[3])
        gpu = bool(found and found[1])
        if kind not in KINDS or gpu != (KINDS[kind].sizes is None):
            tpus = ", ".join(k for k, v in KINDS.items() if v.sizes)
            gpus = ", ".join(k for k, v in KINDS.items() if not v.sizes)
            raise ConfigError(
                f"--topology {name!r} is no machine known here: write KIND-NUMBER with a TPU ({tpus}), such as v5e-16, "
                f"or NUMBERxKIND with a GPU ({gpus}), such as 8xh100."
            )
        number = int(found[1] or found[4])
        if gpu:
            if not 1 <= number <= 4096:
                raise ConfigError(f"--topology {name!r}: give 1 to 4096 GPUs.")
            return cls(name, kind, number)
        sizes = KINDS[kind].sizes
        if number not in sizes:
            counted = " (TensorCores, two a chip)" if kind == "v5p" else ""
            raise ConfigError(
                f"--topology {name!r}: {kind} comes in slices of {', '.join(map(str, sorted(sizes)))}{counted}."
            )
        return cls(name, kind, number // 2 if kind == "v5p" else number)

    @property
    def is_tpu(self) -> bool:
        return KINDS[self.kind].sizes is not None

    @property
    def grid(self) -> str:
        """Of a TPU's chips, as libtpu names it."""
        return KINDS[self.kind].sizes[2 * self.chips if self.kind == "v5p" else self.chips]

    @property
    def memory(self) -> float:
        """GiB of HBM a chip."""
        return KINDS[self.kind].memory

    @property
    def host(self) -> float | None:
        """GiB of host memory a chip, None where it is not known."""
        return KINDS[self.kind].host

    def mesh(self, config: MeshConfig) -> jax.sharding.Mesh | jax.sharding.AbstractMesh:
        """The mesh of these chips: one that programs compile for, of GPUs one that has shapes alone.

        Args:
          config: sizes that make up the number of chips.

        Raises:
          ConfigError: the compiler is not installed.
          GridError: the mesh does not lie on the grid of chips.
        """
        if self.is_tpu:
            try:
                return config.make(_devices(self.kind, self.grid))
            except NotImplementedError:
                raise GridError(
                    f"a mesh of data {config.data}, memory {config.memory}, model {config.model} does not lie on the "
                    f"grid of chips of {self.name}, {self.grid}: let each axis be a product of sides of the grid."
                ) from None
        return jax.sharding.AbstractMesh((config.data, config.memory, config.model), AXES)


@functools.cache
def _devices(kind: str, grid: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("the compiler for TPUs, libtpu, is not installed: `make tpu` adds it to .venv.")
    # There is no metadata server to ask what machine this is, other processes may compile too, and its log is long.
    for name, value in dict(
        TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_MIN_LOG_LEVEL="4", TPU_STDERR_LOG_LEVEL="4",
        TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE=f"{kind}-8",
    ).items():  # fmt: skip
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    return topologies.get_topology_desc(f"{kind}:{grid}", platform="tpu").devices
