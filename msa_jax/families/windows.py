"""Attention in windows as a `config.json` has it: `layer_types`, or what a family says before there were any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msa_jax.families.fields import Fields
from msa_jax.spec import LayerSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def read(fields: Fields, window: int | None, kinds: Sequence[str]) -> list[int | None]:
    """The window of every layer, None for none.

    Args:
      fields: of the file.
      window: in tokens, of the layers that have one.
      kinds: of the layers, unless `layer_types` says.
    """
    kinds, usual = fields.get("layer_types") or kinds, kinds
    fields.need(isinstance(kinds, Sequence) and len(kinds) == len(usual), "layer_types", f"must be {len(usual)} words")
    for kind in kinds:
        fields.need(kind in (FULL, SLIDING), "layer_types", f"has {kind!r}, need {FULL!r} or {SLIDING!r}")
        fields.need(kind == FULL or window is not None, "layer_types", f"has {kind!r}, but there is no sliding_window")
    return [window if kind == SLIDING else None for kind in kinds]


def read_qwen(fields: Fields, num_layers: int) -> list[int | None]:
    """Of Qwen 2 and 3: only with `use_sliding_window`, and without `layer_types` from `max_window_layers` on."""
    fields.get("sliding_window")  # it says nothing without the flag
    if not fields.flag("use_sliding_window"):
        return read(fields, None, [FULL] * num_layers)
    first = fields.integer("max_window_layers", least=0)
    kinds = [SLIDING if i >= first else FULL for i in range(num_layers)]
    return read(fields, fields.integer("sliding_window"), kinds)


def write(specs: Sequence[LayerSpec]) -> dict[str, Any]:
    """What `read` reads back; nothing for layers without windows."""
    windows = [spec.window for spec in specs if spec.window is not None]
    if not windows:
        return {}
    return {"sliding_window": windows[0], "layer_types": [FULL if s.window is None else SLIDING for s in specs]}


def write_qwen(specs: Sequence[LayerSpec]) -> dict[str, Any]:
    """What `read_qwen` reads back."""
    fields = write(specs)
    return fields | {"use_sliding_window": True} if fields else {}
