"""The device mesh, and how arrays are spread over it.

Axes: "data" has its own questions, "memory" its own documents, "model" its own heads and part of the MLP. A mesh of
one device has all three, of size 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from msa_jax.config import MSAConfig
from msa_jax.errors import ConfigError, require

DATA, MEMORY, MODEL = AXES = ("data", "memory", "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh and which arrays use it.

    Attributes:
      data: devices along "data"; -1: as many as the others leave.
      memory, model: devices along these axes.
      fsdp: spread parameters and optimiser state over "data" and "memory" too; each layer's are gathered when it runs.
    """

    data: int = -1
    memory: int = 1
    model: int = 1
    fsdp: bool = False

    def __post_init__(self):
        for name in AXES:
            size = getattr(self, name)
            require(
                isinstance(size, int) and (size >= 1 or (name == DATA and size == -1)),
                f"mesh.{name} must be an integer of at least 1{' or -1, what is left' if name == DATA else ''}, "
                f"got {size!r}.",
            )

    def make(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices`, by default all of all processes.

        Raises:
          ConfigError: the sizes do not make up the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        rest = self.memory * self.model
        data = len(devices) // rest if self.data == -1 else self.data
        require(
            data * rest == len(devices) and data > 0,
            f"a mesh of data {self.data}, memory {self.memory}, model {self.model} does not make up {len(devices)} "
            f"devices: choose sizes whose product is {len(devices)}, or data -1 and a divisor of it for the others.",
        )
        return jax.make_mesh(
            (data, self.memory, self.model), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices
        )


@dataclasses.dataclass(frozen=True)
class Shardings:
    """A PartitionSpec for each kind of array. `Shardings()` spreads nothing.

    Attributes:
      documents: packed rows [R, ...], the chunks of a batch and what is computed of them.
      questions: [B, ...].
      pairs: [B, N], what a question has for each document.
      bank: mesh axes over which the chunks and documents of a bank in use are spread, or None: it is on one device.
      into: matrices [in, out] whose outputs are heads or hidden units of the MLP.
      out_of: matrices [in, out] whose inputs are.
      embedding: [V, E].
      vector: scales of norms and the like.
    """

    documents: P = P()
    questions: P = P()
    pairs: P = P()
    bank: tuple[str, ...] | None = None
    into: P = P()
    out_of: P = P()
    embedding: P = P()
    vector: P = P()

    @classmethod
    def training(cls, config: MeshConfig) -> Shardings:
        """Documents over data and memory, each device encoding its own; questions over data."""
        whole = (DATA, MEMORY) if config.fsdp else None
        return cls(
            documents=P((DATA, MEMORY)),
            questions=P(DATA),
            pairs=P(None, (DATA, MEMORY)),
            bank=(DATA, MEMORY),
            into=P(whole, MODEL),
            out_of=P(MODEL, whole),
            embedding=P(MODEL, whole),
        )

    @classmethod
    def inference(cls) -> Shardings:
        """The bank over memory and model; questions over data."""
        return dataclasses.replace(cls.training(MeshConfig()), bank=(MEMORY, MODEL))

    def parameter(self, path: Sequence[object], ndim: int) -> P:
        """Of a model's parameter, by its path; leading axes that stack layers are whole."""
        names = {str(part) for part in path}
        if "embed" in names or "lm_head" in names:
            # [V, E], and the output head [E, V].
            spec = self.embedding if "embed" in names else P(*reversed(tuple(self.embedding) or (None, None)))
        elif names & {"o_proj", "down"}:
            spec = self.out_of
        elif names & {"gate", "up"} or any(name.endswith("_proj") for name in names):
            spec = self.into
        else:
            spec = self.vector
        if "bias" in names:
            spec = P(*tuple(spec)[1:])
        return P(*[None] * (ndim - len(spec)), *spec)

    def parameters(self, state: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
        """A NamedSharding for every parameter of a state, abstract or not.

        Raises:
          ConfigError: a size that the mesh does not divide; the parameter is named.
        """

        def one(path, value):
            keys = [getattr(k, "key", getattr(k, "name", k)) for k in path]
            spec = self.parameter(keys, value.ndim)
            for size, axes in zip(value.shape, spec, strict=False):
                ways = math.prod(mesh.shape[a] for a in _tuple(axes))
                require(
                    size % ways == 0,
                    f"parameter {'.'.join(map(str, keys))} {value.shape}: the mesh axes {', '.join(_tuple(axes))} "
                    f"spread {size} over {ways} devices, which do not divide it: choose another mesh.",
                )
            return jax.sharding.NamedSharding(mesh, spec)

        return jax.tree_util.tree_map_with_path(one, state)


def placed(model: nnx.Module, mesh: jax.sharding.Mesh, shardings: Shardings) -> nnx.Module:
    """The model with its parameters spread over a mesh.

    Raises:
      ConfigError: a size that the mesh does not divide.
    """
    graphdef, state = nnx.split(model)
    state = nnx.as_pure(state)
    return nnx.merge(graphdef, jax.device_put(state, shardings.parameters(state, mesh)))


def check_model(config: MSAConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError unless the mesh's "model" axis divides what it spreads."""
    ways = mesh.shape[MODEL]
    for name in ("num_heads", "num_kv_heads", "mlp_size", "vocab_size"):
        size = getattr(config, name)
        require(size % ways == 0, f"mesh.model {ways} does not divide {name} {size}: choose a divisor of it.")


def put(tree, sharding: jax.sharding.NamedSharding):
    """Host arrays, the same in every process, onto the mesh: each process gives its devices their parts."""

    def one(value):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(one, tree)


def constrain(x, spec: P):
    """Tell XLA how an array of a traced program is spread.

    Nothing without a mesh in scope, with an empty spec, or of an array whose sizes the mesh does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not spec or mesh.empty:
        return x
    if any(size % math.prod(mesh.shape[a] for a in _tuple(axes)) for size, axes in zip(x.shape, spec, strict=False)):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def _tuple(axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


__all__ = ["AXES", "ConfigError", "MeshConfig", "Shardings", "check_model", "constrain", "placed", "put"]
