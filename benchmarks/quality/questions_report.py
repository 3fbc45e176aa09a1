"""Recall of real questions' passages as a table and as a figure, from the rows of `benchmarks/quality/questions.py`."""

from __future__ import annotations

import pathlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure

RECALL_AT = (1, 5, 10, 16)
ALL_AT = 16


def table(rows: list[dict]) -> str:
    names = [*(f"recall@{k}" for k in RECALL_AT), f"all@{ALL_AT}"]
    lines = [f"| questions | bank | method | {' | '.join(names)} |", "|---|---|---|" + "---:|" * len(names)]
    for row in rows:
        for method, scores in row["methods"].items():
            cells = " | ".join(f"{scores[name]:.3f}" for name in names)
            where = f"{row['set']} ({row['questions']}) | {row['bank']} ({row['passages']:,})"
            lines.append(f"| {where} | {method} | {cells} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Recall@k over k on the bank of all passages, one panel a set."""
    shown = [row for row in rows if row["bank"] == "all"]
    figure = Figure(figsize=(3.6 * len(shown), 3.6), layout="constrained")
    for row, axes in zip(shown, np.atleast_1d(figure.subplots(1, len(shown), sharey=True)), strict=True):
        for style, name in zip(("o-", "s-", "^--"), ("bm25", "router", "bm25 + router, fused"), strict=True):
            axes.plot(*zip(*row["methods"][name]["curve"], strict=True), style, label=name, markersize=4)
        axes.set_xscale("log")
        axes.set(title=f"{row['set']}, {row['passages']:,} passages", xlabel="k", ylim=(0, 1))
        axes.set_xticks([1, 5, 10, 16, 40, 100], labels=["1", "5", "10", "16", "40", "100"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("recall of supporting passages")
    figure.axes[0].legend(frameon=False, loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"savefig.dpi": 144}):
        figure.savefig(path)
