"""Ablations by name: what each changes in `configs/small.py`, as fields of the config.

    python -m benchmarks.quality.variants [NAME ...]

prints the command that trains each one alone.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import runpy
import shlex
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from msa_jax.errors import ConfigError
from msa_jax.runs.config import RunConfig

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "small.py"

_NO_AUX = {"training.phases[0].aux_weight": 0.0, "training.phases[1].aux_weight": 0.0}
# The first phase as the second: the LM loss in full, documents scored by the best token, from the first step.
_NO_WARM_UP = {
    "training.phases[0].lm_weight": 1.0,
    "training.phases[0].aux_weight": 0.5,
    "training.phases[0].mean_over_tokens": False,
}
_PROPORTIONAL = {"model.proportional_attention": True}
_LONGER = {"training.phases[1].steps": 360}
_LONGEST = {"training.phases[1].steps": 560}
_LOUD = {"training.copy_scale": 2.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    # The paper's table of ablations.
    "no aux loss": _NO_AUX,
    "no warm-up": _NO_WARM_UP,
    "no original text": {"data.samples": "latent"},
    # What is beyond the paper.
    "no router bias": {"model.router_bias": False},
    "plain ids": {"tokenizer.numbers": "plain"},
    "k 4": {"model.top_k": 4},
    "k 8": {"model.top_k": 8},
    "P 32": {"model.chunk_size": 32},
    "P 64": {"model.chunk_size": 64},
    # The length curriculum: the second phase keeps the documents of seven batches, or of the last one.
    "7 recent batches": {"training.phases[1].recent": 7},
    "1 recent batch": {"training.phases[1].recent": 1},
    "16 documents": {"data.num_documents": 16, "data.num_questions": 16},
    "64 documents": {"data.num_documents": 64},
    "128 documents": {"data.num_documents": 128},
    "untied router": {"training.tied_router": False},
    "no copy circuit": {"training.copy_scale": 0.0},
    "200 steps": {"training.phases[1].steps": 160},
    # Does the LM loss, through the router bias, teach the router?
    "aux loss in the warm-up only": {"training.phases[1].aux_weight": 0.0},
    "labels for 10 %": {"data.label_fraction": 0.1},
    "30 % unanswerable": {"data.unanswerable": 0.3},
    "no aux loss and no router bias": _NO_AUX | {"model.router_bias": False},
    # What is not learned in the base's steps: is it learned in two and a half times as many?
    "plain ids and 400 steps": {"tokenizer.numbers": "plain"} | _LONGER,
    "P 32 and 400 steps": {"model.chunk_size": 32} | _LONGER,
    # A chunk that weighs as much as its tokens. With P 64 four times the copying makes up for four times the mean.
    "proportional": _PROPORTIONAL,
    "P 32 proportional and 400 steps": {"model.chunk_size": 32} | _PROPORTIONAL | _LONGER,
    "P 64 proportional and 600 steps": {"model.chunk_size": 64} | _PROPORTIONAL | _LOUD | _LONGEST,
    "P 64 and 600 steps": {"model.chunk_size": 64} | _LOUD | _LONGEST,
}


def load_config(path: str | pathlib.Path) -> ConfigDict:
    """What `get_config()` of the file returns, as for `--config`."""
    return runpy.run_path(str(path))["get_config"]()


def make_run(config: ConfigDict, changes: Mapping[str, Any], seed: int) -> RunConfig:
    """The run of a config with some fields changed.

    Args:
      config: all fields of a run; it stays as it is.
      changes: value by field, such as `training.phases[0].aux_weight`.
      seed: of parameters and data.

    Raises:
      ConfigError: there is no such field, or its value is bad.
    """
    changed = ConfigDict(copy.deepcopy(config.to_dict()))  # lists would be shared
    for field, value in {**changes, "training.seed": seed}.items():
        try:
            config_path.get_value(field, changed)
        except (AttributeError, KeyError, IndexError, TypeError):
            raise ConfigError(f"The config has no field {field!r}; see `python train.py --help`.") from None
        config_path.set_value(field, changed, value)
    return RunConfig.from_dict(changed.to_dict())


def command(name: str, seed: int, workdir: str = "") -> str:
    """The command line that trains a variant; raises ConfigError for an unknown name."""
    changes = {**find(name), "training.seed": seed}
    given = " ".join(shlex.quote(f"--config.{field}={value}") for field, value in changes.items())
    return f"python train.py --config=configs/small.py {given} --workdir={workdir or 'runs/' + slug(name, seed)}"


def find(name: str) -> dict[str, Any]:
    """The changes of a variant; raises ConfigError for an unknown name."""
    if name not in VARIANTS:
        raise ConfigError(f"No variant {name!r}; there are {', '.join(VARIANTS)}.")
    return VARIANTS[name]


def slug(name: str, seed: int) -> str:
    """The folder of a run."""
    return f"{name.replace(' ', '_').replace('%', 'percent')}_{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.names:
        print(f"{name}:\n    {command(name, options.seed)}")


if __name__ == "__main__":
    main()
