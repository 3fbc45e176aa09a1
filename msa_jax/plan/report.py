"""The table of a plan, for people and as JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Sequence
from typing import Any

from msa_jax.plan.choose import Row
from msa_jax.plan.topologies import Topology

_COLUMNS = ("arguments", "temporaries", "output", "alias", "host", "needed")


def table(topology: Topology, rows: Sequence[Row]) -> str:
    """Lines of GiB a chip."""
    host = f", {topology.host:g} GiB of host memory each" if topology.host else ""
    by = "compiled" if topology.is_tpu else "by arithmetic, temporaries are an estimate"
    lines = [
        f"{topology.name}: {topology.chips} chips with {topology.memory:g} GiB{host}; GiB a chip, {by}",
        f"{'program':10}{'mesh':>9}" + "".join(f"{name:>13}" for name in _COLUMNS) + "  fits",
    ]
    for row in rows:
        mesh = "x".join(str(row.mesh[axis]) for axis in ("data", "memory", "model"))
        values = "".join(f"{_figure(getattr(row.usage, name)):>13}" for name in _COLUMNS)
        fits = "yes" if row.fits else "NO"
        guess = " (by arithmetic)" if topology.is_tpu and row.usage.by == "arithmetic" else ""
        lines += [f"{row.program:10}{mesh:>9}{values}  {fits}{guess}", f"{'':10}{row.how}"]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else "?" if math.isinf(value) else f"{value:.2f}"


def as_json(topology: Topology, rows: Sequence[Row]) -> dict[str, Any]:
    """What `table` shows, with versions."""
    versions = {}
    for name in ("jax", "libtpu"):
        found = [d.version for d in importlib.metadata.distributions(name=name)]
        versions |= {name: found[0]} if found else {}
    return dict(
        topology=topology.name, chips=topology.chips, chip_gib=topology.memory, host_gib_a_chip=topology.host,
        unit="GiB a chip", versions=versions, programs=[_rounded(dataclasses.asdict(row)) for row in rows],
    )  # fmt: skip


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else None
    return value
