"""Pictures of results."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

_CURVES = (
    ("exact_match", "answer, exact match", "o-"),
    ("id_exact_match", "document ids, exact match", "s--"),
    ("router_recall@1", "router recall@1", "^:"),
    ("router_recall@16", "router recall@16", "v:"),
)


def token_count(tokens: float) -> str:
    """16384 -> 16K, 1048576 -> 1M, 100000000 -> 100M: whole decimal millions, then binary where it divides."""
    if tokens and tokens % 1e6 == 0:
        return f"{int(tokens / 1e6)}M"
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{int(tokens // unit)}{name}"
    for unit, name in ((1e6, "M"), (1e3, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return f"{tokens:.0f}"


def plot_curve(rows: Sequence[dict[str, Any]], path: str | pathlib.Path) -> None:
    """Scores against tokens of memory, log axis; of several router layers the worst is drawn."""
    rows = [row for row in rows if row.get("retriever", "router") == "router"]
    rows = sorted(rows, key=lambda row: row["memory_tokens"])
    sizes = [row["memory_tokens"] for row in rows]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, label, style in _CURVES:
        if name in rows[0]:
            values = [min(row[name]) if isinstance(row[name], list) else row[name] for row in rows]
            axes.plot(sizes, values, style, label=label, alpha=0.85)
    axes.set_xscale("log")
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: token_count(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens of memory", ylabel="score", ylim=(-0.02, 1.04))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=False)
    with matplotlib.rc_context({"savefig.dpi": 144}):
        figure.savefig(path)
