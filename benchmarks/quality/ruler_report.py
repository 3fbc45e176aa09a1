"""RULER's scores as a table and a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from msa_jax.data.haystacks.ruler_tasks import TASKS
from msa_jax.evaluation.plots import token_count


def sizes_of(rows: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({row["memory_tokens"] for row in rows})


def averages(rows: Sequence[dict[str, Any]], name: str = "string_match") -> dict[int, float]:
    """Mean over tasks at every size at which all tasks were asked that were asked at the smallest."""
    by_size = {size: {r["task"]: r[name] for r in rows if r["memory_tokens"] == size} for size in sizes_of(rows)}
    full = by_size[min(by_size)].keys()
    return {size: float(np.mean(list(scores.values()))) for size, scores in by_size.items() if scores.keys() == full}


def table(rows: Sequence[dict[str, Any]], name: str = "string_match") -> str:
    """One line a task, one column a size, then the mean and the share of the smallest size's mean that is kept."""
    sizes, found = sizes_of(rows), {(r["task"], r["memory_tokens"]): r[name] for r in rows}
    lines = ["| task | " + " | ".join(map(token_count, sizes)) + " |", "|---|" + "---:|" * len(sizes)]

    def line(label, values):
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    for task in TASKS:
        if any(row["task"] == task for row in rows):
            line(f"`{task}`", [found.get((task, size)) for size in sizes])
    mean = averages(rows, name)
    line("mean", [mean.get(size) for size in sizes])
    first = mean[sizes[0]]
    line(f"kept of {token_count(sizes[0])}", [mean[size] / first if size in mean and first else None for size in sizes])
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: str | pathlib.Path) -> None:
    """Scores of every task against tokens of memory, of the first mode, and the mean over tasks of every mode."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    first = [row for row in rows if row["mode"] == modes[0]]
    for task, style in zip(TASKS, ("o-", "s-", "^-", "v-", "D-", "P-", "X--", "*--"), strict=True):
        own = sorted((row["memory_tokens"], row["string_match"]) for row in first if row["task"] == task)
        if own:
            axes.plot(*zip(*own, strict=True), style, label=task.removeprefix("niah_"), alpha=0.75, linewidth=1)
    for mode, style in zip(modes, ("k-", "k--", "k:", "k-."), strict=False):
        mean = averages([row for row in rows if row["mode"] == mode])
        axes.plot(list(mean), list(mean.values()), style, label=f"mean, {mode}", linewidth=2)
    axes.set_xscale("log")
    axes.set_xticks(sizes_of(rows))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: token_count(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens of memory", ylabel="share of wanted values in the answer", ylim=(-0.02, 1.04))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"savefig.dpi": 144}):
        figure.savefig(path)
