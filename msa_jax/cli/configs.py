"""Configs that come with this package, found by name: `--config=demo` as well as `--config=configs/demo.py`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from msa_jax.errors import ConfigError


def config_names() -> list[str]:
    """Names of the configs that come with this package."""
    return sorted(path.stem for path in _FOLDER.glob("[!_]*.py"))


def config_path(given: str) -> str:
    """The file of a config that is given by name, or by a path, with its argument if there is one (`demo:argument`).

    A file that exists is itself. `configs/NAME.py` is the one of that name in any folder.

    Raises:
      ConfigError: there is neither such a file nor such a name.
    """
    path, colon, argument = given.partition(":")
    if not pathlib.Path(path).is_file():
        name = pathlib.Path(path).stem if pathlib.Path(path).parent.name == "configs" else path
        if name not in config_names():
            raise ConfigError(
                f"--config={given}: no such file or config: give a file with get_config(), or one of "
                f"{', '.join(config_names())}."
            )
        path = str(_FOLDER / f"{name}.py")
    return f"{path}{colon}{argument}"


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line, its --config as `config_path` has it; raises ConfigError as that does."""
    found = list(arguments)
    for i, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            continue
        if equals:
            found[i] = f"{flag}={config_path(value)}"
        elif i + 1 < len(found):
            found[i + 1] = config_path(found[i + 1])
    return found


_FOLDER = pathlib.Path(__file__).parents[1] / "configs"
