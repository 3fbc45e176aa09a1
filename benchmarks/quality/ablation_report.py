"""The table and the figure of ablations: means over seeds, with the lowest and the highest where there are several."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from msa_jax.evaluation.plots import token_count

Run = dict[str, Any]


def spread(values: Sequence[float | None], form: str = "{:.2f}") -> str:
    """Mean, and (lowest to highest) of several that differ; values that are None never came."""
    there = [value for value in values if value is not None]
    if not values:
        return ""
    if not there:
        return "never"
    shown = form.format(np.mean(there))
    if min(there) < max(there):
        shown += f" ({form.format(min(there))} to {form.format(max(there))})"
    if len(there) < len(values):
        shown += f", {len(values) - len(there)} of {len(values)} never"
    return shown


def rows_at(run: Run, memory_tokens: int, way: str, step: int = 0) -> list[Run]:
    """The row of a run for a size, way and checkpoint, if there is one."""
    return [
        row for row in run["rows"]
        if (row["memory_tokens"], row["way"], row["step"]) == (memory_tokens, way, step)
    ]  # fmt: skip


def collect(runs: Iterable[Run], size: int, way: str, take: Callable[[Run], float]) -> list[float]:
    """One figure of every run that was asked so."""
    return [take(row) for run in runs for row in rows_at(run, size, way)]


def by_variant(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of each variant, in order of seeds."""
    groups: dict[str, list[Run]] = {}
    for run in sorted((run for run in runs if "variant" in run), key=lambda run: run["seed"]):
        groups.setdefault(run["variant"], []).append(run)
    return groups


def sizes_of(runs: Iterable[Run]) -> list[int]:
    return sorted({row["memory_tokens"] for run in runs for row in run["rows"] if not row["step"]})


def own_way(runs: Sequence[Run]) -> str:
    """The way that a variant was trained for."""
    return "latent" if runs[0]["changes"].get("data.samples") == "latent" else "generate"


def table(runs: Iterable[Run]) -> str:
    """Markdown: a row for each variant; recall of the worse router layer, answers in three modes of asking."""
    runs = list(runs)
    sizes = sizes_of(runs)
    titles = ["variant", "seeds", "recall@1 0.95 at step", "LM loss 0.1 at step"]
    for size in sizes:
        told = token_count(size)
        titles += [f"recall@1, {told}", f"ids, {told}", f"answer, {told}", f"constrained, {told}", f"router, {told}"]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name, group in by_variant(runs).items():
        way = own_way(group)
        cells = [name, str(len(group))]
        cells += [spread([run["learned"][key] for run in group], "{:.0f}") for key in ("recall@1 0.95", "lm_loss 0.1")]
        for size in sizes:
            takes = (
                (way, lambda row: min(row["router_recall@1"])),
                ("generate", lambda row: row["id_exact_match"]),
                (way, lambda row: row["exact_match"]),
                ("constrained", lambda row: row["exact_match"]),
                ("router", lambda row: row["exact_match"]),
            )
            cells += [spread(collect(group, size, asked, take)) or "-" for asked, take in takes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(runs: Iterable[Run], path: str | pathlib.Path) -> None:
    """Answers of every variant at each size: a bar for the mean, a dot for every seed."""
    runs = list(runs)
    groups, sizes = by_variant(runs), sizes_of(runs)
    made = Figure(figsize=(9, 1.2 + 0.42 * len(groups)), layout="constrained")
    axes = made.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axis, size in zip(axes, sizes, strict=True):
        for place, group in enumerate(groups.values()):
            for shift, field, colour in ((-0.18, "id_exact_match", "#8fb3d9"), (0.18, "exact_match", "#1f4e79")):
                values = collect(group, size, own_way(group), lambda row, field=field: row[field])
                if values:
                    axis.barh(place + shift, np.mean(values), height=0.34, color=colour)
                    axis.plot(values, [place + shift] * len(values), "k.", markersize=4)
        axis.set(xlim=(0, 1.02), title=f"{token_count(size)} tokens of memory", xlabel="share of questions")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(groups)), list(groups))
    axes[0].invert_yaxis()
    for colour, label in (("#8fb3d9", "document ids exact"), ("#1f4e79", "answer exact")):
        axes[-1].barh([0], [0], color=colour, label=label)
    made.legend(loc="outside lower center", ncols=2, frameon=False)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=144)
