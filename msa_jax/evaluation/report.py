"""Rows of scores as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """Of a table: the field of a row (of several the first that it has), its title, and how a value is written."""

    field: str | tuple[str, ...]
    title: str
    form: str = "{:.3f}"


def _cell(row: Mapping[str, Any], column: Column) -> str:
    fields = (column.field,) if isinstance(column.field, str) else column.field
    value = next((row[field] for field in fields if row.get(field) is not None), None)
    if isinstance(value, list):
        return " / ".join(column.form.format(one) for one in value)
    return "" if value is None else column.form.format(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Rows as Markdown. A value for each router layer is written as "a / b"; columns without values are left out."""
    cells = {column.title: [_cell(row, column) for row in rows] for column in columns}
    shown = {title: values for title, values in cells.items() if any(values)}
    numbers = [all(value[:1].isdigit() or value[:1] in ("", "-") for value in values) for values in shown.values()]
    lines = [
        "| " + " | ".join(shown) + " |",
        "|" + "".join("---:|" if number else "---|" for number in numbers),
    ]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in zip(*shown.values(), strict=True)])
