"""Which layout of a bank, which mesh and how many rows fit a machine, tried from the best to the smallest."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from msa_jax.config import MSAConfig
from msa_jax.plan import estimate, measure, programs
from msa_jax.plan.measure import Usage
from msa_jax.plan.programs import Program
from msa_jax.plan.settings import Bank, Sizes, check_mesh, serving_meshes, training_meshes
from msa_jax.plan.topologies import GridError, Topology
from msa_jax.sharding import MeshConfig

# GiB of a TPU that are left for its runtime.
_MARGIN = 0.5
# Of a chip's memory, what may be filled by an estimate.
_ESTIMATED_SHARE = 0.92
# Rows of a chip that the encoder is tried with.
_ROWS = (8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class Row:
    """A program on a machine.

    Attributes:
      mesh: devices along data, memory and model.
      how: what was chosen, in words.
      usage: GiB of a chip. estimated: temporaries by arithmetic, GiB.
      fits: on the chip, and its part of the host.
    """

    program: str
    mesh: dict[str, int]
    how: str
    usage: Usage
    estimated: float
    fits: bool


def plan(
    config: MSAConfig,
    topology: Topology,
    sizes: Sizes,
    names: Sequence[str],
    banks: Sequence[Bank],
    mesh: MeshConfig | None = None,
    progress: Callable[[str], Any] = lambda text: None,
) -> list[Row]:
    """Rows of the programs asked for, each with the first choice that fits, else the last one.

    Questions and decoding share a bank, and so one choice.

    Args:
      names: of `settings.PROGRAMS`.
      banks: to choose from, the best first.
      mesh: of all programs; default the first of `serving_meshes` for questions, all chips along data to encode, and
        the first of `training_meshes` that fits to train.
      progress: called with a line before and after each compilation.

    Raises:
      ConfigError: the mesh does not divide the model or a batch; the compiler is not installed.
    """
    sizes.check(config)
    asked = [name for name in ("question", "decode") if name in names]
    found: list[Row] = []
    if asked:
        serving = _meshes(mesh, serving_meshes(config, topology.chips), topology)[0]
        check_mesh(config, serving, sizes, "batch")
    if "train" in names:
        given = mesh and dataclasses.replace(mesh, fsdp=True)
        training = _meshes(given, training_meshes(config, topology.chips), topology)
        for its in training:
            check_mesh(config, its, sizes, "train_batch")
    if asked:
        found += _first(_serving(config, topology, sizes, asked, banks, serving), topology, progress)
    if "encode" in names:
        found += _first(_encoding(config, topology, sizes, mesh), topology, progress)
    if "train" in names:
        found += _first(_training(config, topology, sizes, training), topology, progress)
    return found


def _meshes(given: MeshConfig | None, defaults: list[MeshConfig], topology: Topology) -> list[MeshConfig]:
    """The mesh given, or the defaults that lie on the machine's grid of chips."""
    if given is not None:
        return [given]
    found = []
    for mesh in defaults:
        with contextlib.suppress(GridError):
            topology.mesh(mesh)
            found.append(mesh)
    return found


Choice = list[tuple[Program, MeshConfig, str, float]]


def _serving(config, topology, sizes, asked, banks, mesh) -> Iterator[Choice]:
    on = topology.mesh(mesh)
    for bank in banks:
        made = {name: getattr(programs, name)(config, on, bank, sizes) for name in asked}
        yield [(made[name], mesh, str(bank), getattr(estimate, name)(config, mesh, sizes)) for name in asked]


def _encoding(config, topology, sizes, mesh) -> Iterator[Choice]:
    mesh = mesh or MeshConfig(data=topology.chips)
    on = topology.mesh(mesh)
    for rows in _ROWS if sizes.rows is None else (sizes.rows,):
        how = f"{rows} rows of {sizes.row_tokens:,} tokens a chip, parameters bfloat16"
        yield [(programs.encode(config, on, sizes, rows), mesh, how, estimate.encode(config, sizes, rows))]


def _training(config, topology, sizes, meshes) -> Iterator[Choice]:
    how = (
        f"{sizes.train_tokens:,} tokens of memory in rows of {sizes.train_row_tokens:,}, {sizes.train_batch} questions "
        f"of {sizes.train_question_tokens}, float32 parameters and AdamW over all chips, remat full"
    )
    for mesh in meshes:
        program, guess = programs.train(config, topology.mesh(mesh), sizes, mesh), estimate.train(config, mesh, sizes)
        # This program takes minutes to compile, so one that is unlikely to fit is left out while there is another.
        if mesh is meshes[-1] or measure.arguments(program)[0] + guess <= _ESTIMATED_SHARE * topology.memory:
            yield [(program, mesh, how, guess)]


def _first(choices: Iterator[Choice], topology: Topology, progress) -> list[Row]:
    """The first choice whose programs all fit, else the last."""
    rows: list[Row] = []
    for choice in choices:
        by_shapes = [_by_shapes(topology, *one) for one in choice]
        # What shapes alone rule out need not be compiled.
        if not topology.is_tpu or not all(_may_fit(topology, row) for row in by_shapes):
            rows = by_shapes
        else:
            rows = []
            for one, guess in zip(choice, by_shapes, strict=True):
                progress(f"{topology.name}: compiling {guess.program}: {guess.how}")
                usage = measure.compiled(one[0])
                fits = usage.needed <= _room(topology) and _host_fits(topology, usage.host or 0)
                rows.append(dataclasses.replace(guess, usage=usage, fits=fits))
        if all(row.fits for row in rows):
            break
    return rows


def _by_shapes(topology, program, mesh, how, temporaries) -> Row:
    chip, host = measure.arguments(program)
    usage = Usage(
        arguments=chip, temporaries=temporaries, host=host, needed=chip + temporaries, by="arithmetic", seconds=None
    )
    return Row(
        program=program.name, mesh=dict(data=mesh.data, memory=mesh.memory, model=mesh.model), how=how, usage=usage,
        estimated=temporaries, fits=usage.needed <= _room(topology) and _host_fits(topology, host),
    )  # fmt: skip


def _room(topology) -> float:
    return topology.memory - _MARGIN if topology.is_tpu else _ESTIMATED_SHARE * topology.memory


def _may_fit(topology, row) -> bool:
    return row.usage.arguments <= _room(topology) and _host_fits(topology, row.usage.host)


def _host_fits(topology, host) -> bool:
    return topology.host is None or host <= topology.host
