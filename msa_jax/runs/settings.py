"""Every setting of a run, with its value, its type and what it is: for `train.py --print_config`, and docs/settings.md.

    python -m msa_jax.runs.settings > docs/settings.md

What a setting is stands in its dataclass's docstring, under `Attributes:`, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from msa_jax.config import PRESETS, MSAConfig
from msa_jax.data.sources import field_types, names, settings_type
from msa_jax.runs.config import RunConfig, full_config
from msa_jax.training.config import Phase

_PAGE = """\
# Settings of a run

[Glossary](glossary.md)

Every row is a flag: `--config.NAME=VALUE` of `train.py` and `eval.py` sets it, whatever the config file says. The
values here are the defaults, with a model of the preset `tiny`. `python train.py --config=configs/demo.py
--print_config` prints the values of a config. `python -m msa_jax.runs.settings > docs/settings.md` writes this page.
"""


class Row(NamedTuple):
    """One setting: its name as a flag has it, its value, its type, and what it is."""

    name: str
    value: Any
    type: str
    help: str


class Group(NamedTuple):
    """Settings that belong together."""

    title: str
    rows: list[Row]


def field_help(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it derives from say of its fields, by name, each on one line."""
    fields = "|".join(field.name for field in dataclasses.fields(kind))
    entry = re.compile(rf"(?<!\S)((?:{fields})(?:, (?:{fields}))*): ")
    found: dict[str, str] = {}
    for base in kind.__mro__:
        _, _, listed = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        _, *parts = entry.split(" ".join(listed.split()))
        for told, text in zip(parts[::2], parts[1::2], strict=True):
            for name in told.split(", "):
                found.setdefault(name, text.strip())
    return found


def type_name(hint: Any) -> str:
    """A type as a person writes it: `int or None`, `"adamw" or "muon"`."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(f'"{choice}"' for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(hint)))
    if hint is types.NoneType:
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _rows(prefix: str, kind: type, values: Mapping[str, Any]) -> list[Row]:
    """Of the fields that `values` names, in the order of the dataclass."""
    hints, told = field_types(kind), field_help(kind)
    return [
        Row(f"{prefix}{name}", values[name], type_name(hint), told.get(name, ""))
        for name, hint in hints.items()
        if name in values
    ]


def _leaves(value: Any) -> dict[str, Any]:
    """Fields of a dataclass that are settings themselves, no further dataclasses."""
    found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    parts = lambda v: v if isinstance(v, tuple) else (v,)  # noqa: E731
    return {k: v for k, v in found.items() if not any(map(dataclasses.is_dataclass, parts(v)))}


def groups(run: RunConfig) -> Iterator[Group]:
    """All settings of a run."""
    yield Group("run", _rows("", RunConfig, {"init_from": run.init_from}))
    yield Group("model", [*_preset(run), *_rows("model.", MSAConfig, _model(run))])
    source = run.data.settings
    training = run.training
    for title, value in (
        ("tokenizer", run.tokenizer), ("data", run.data), ("data.loss_weights", run.data.loss_weights),
        (f"data, source {run.data.source}", source), ("training", training), ("training.optimizer", training.optimizer),
        *((f"training.phases[{i}]", phase) for i, phase in enumerate(training.phases)),
        ("evaluation", run.evaluation), ("mesh", run.mesh),
    ):  # fmt: skip
        yield Group(title, _rows(f"{title.partition(',')[0]}.", type(value), _leaves(value)))


def _preset(run: RunConfig) -> list[Row]:
    sizes = type_name(Literal[tuple(PRESETS)])
    what = "size of the model, which its other settings change."
    return [] if run.init_from else [Row("model.preset", run.model.get("preset", "tiny"), sizes, what)]


def _model(run: RunConfig) -> dict[str, Any]:
    """The model's settings, those of `init_from` among them if it is there."""
    if run.init_from and not pathlib.Path(run.init_from).exists():
        given = {name: value for name, value in run.model.items() if value is not None}
        values = dict.fromkeys(_leaves(MSAConfig()), "as in init_from") | given
    else:
        values = _leaves(run.model_config(vocab_size=8))
    return {name: value for name, value in values.items() if name != "vocab_size"}  # the tokenizer's


def as_text(run: RunConfig) -> str:
    """A line a setting, grouped, with the first sentence of what it is."""
    lines = []
    for title, rows in groups(run):
        lines += ["", title] if rows else []
        for row in rows:
            first = re.split(r"(?<=\.) ", row.help)[0]
            lines.append(f"  {row.name} = {row.value!r}  ({row.type})  {first}")
    return "\n".join(lines[1:])


def as_page() -> str:
    """The defaults of all settings, of all sources, as Markdown."""
    run = RunConfig.from_dict(full_config({"training": {"phases": [dataclasses.asdict(Phase(steps=1))]}}).to_dict())
    parts = [_PAGE]
    for title, rows in groups(run):
        if title.startswith("data, source"):
            for name in names():
                kind = settings_type(name)
                defaults = {field.name: field.default for field in dataclasses.fields(kind)}
                parts.append(_table(f"data, source {name}", _rows("data.", kind, defaults)))
        else:
            parts.append(_table(title, rows))
    return "\n".join(parts)


def _table(title: str, rows: list[Row]) -> str:
    cell = lambda text: str(text).replace("|", "\\|")  # noqa: E731
    lines = [f"## {title}", "| setting | default | type | what it is |", "|---|---|---|---|"]
    lines += [f"| `{r.name}` | `{cell(repr(r.value))}` | {cell(r.type)} | {cell(r.help)} |" for r in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_page(), end="")
