"""The folder of a run: the settings that it was begun with."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from msa_jax.errors import ConfigError
from msa_jax.files import write_text
from msa_jax.runs.config import RunConfig

_LOG = logging.getLogger(__name__)
# What describes the model that a run went on from.
INIT_CONFIG = "init_config.json"


def written_settings(workdir: pathlib.Path) -> dict[str, Any]:
    """A run's settings as they were written when it began: the same, whatever settings runs have come to have since."""
    return json.loads((workdir / "config.json").read_text())


def differing_settings(run: RunConfig, workdir: pathlib.Path, parts: Sequence[str]) -> list[str]:
    """Names of settings that differ from those that the run in `workdir` was begun with."""
    mine = json.loads(json.dumps(run.to_dict()))
    # Through the settings of today, so that what a run of yesterday could not say is the default.
    theirs = json.loads(json.dumps(RunConfig.from_dict(written_settings(workdir)).to_dict()))
    return [
        f"{part}.{name}"
        for part in parts
        for name in sorted(mine[part].keys() | theirs.get(part, {}).keys())
        if mine[part].get(name) != theirs.get(part, {}).get(name)
    ]


def check_workdir(run: RunConfig, workdir: pathlib.Path) -> None:
    """Record the settings of a new run, or make sure that they are still those of the one in `workdir`.

    With them is kept what the model of `init_from` is, so that a trained run needs that folder no more. Settings of a
    run that was refused before its first step bind nobody.

    Raises:
      ConfigError: `workdir` holds a run with another model, data or tokenizer; the settings are named.
    """
    path = workdir / "config.json"
    if path.is_file():
        differing = differing_settings(run, workdir, ("model", "data", "tokenizer", "training"))
        if not differing:
            return
        if (workdir / "metrics.jsonl").exists():
            raise ConfigError(
                f"{workdir} holds a run with other settings of {', '.join(differing)}; use another workdir, or the "
                f"settings in {path}."
            )
        _LOG.info("%s: the run that was there ended before its first step; begun anew", workdir)
        shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
    workdir.mkdir(parents=True, exist_ok=True)
    if run.init_from:
        base = pathlib.Path(run.init_from)
        write_text(workdir / INIT_CONFIG, (base / "config.json" if base.is_dir() else base).read_text())
    write_text(path, json.dumps(run.to_dict(), indent=2) + "\n")
