"""What the entry points share: log lines, and errors of the user's as one sentence."""

from __future__ import annotations

import logging
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging

from msa_jax.checkpoint import CheckpointError
from msa_jax.config import ConfigError
from msa_jax.data import DataError
from msa_jax.training.loop import TrainingDiverged


def _show_log() -> None:
    """Print this project's log lines to stderr, and of its libraries only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    log = logging.getLogger("msa_jax")
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.propagate = False


def _fail(message: object) -> SystemExit:
    """Exit status 1 with the message on one line, after the command's name."""
    return SystemExit(f"{pathlib.Path(sys.argv[0]).name}: {' '.join(str(message).split())}")


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, IndexError, FileNotFoundError) as error:
        # A config's fields are flags, and one that it lacks is no flags.Error.
        detail = str(error).strip('"')
        raise _fail(f"{detail} (--help lists flags; --config.NAME=VALUE sets a field of the config file)") from None
    if rest[1:]:
        raise _fail(f"unknown arguments {' '.join(rest[1:])}.")
    return rest


def run_command(main: Callable[[], None]) -> None:
    """Parse flags and call `main`; a mistake of the user's ends in one sentence and exit status 1."""

    def guarded(_):
        _show_log()
        try:
            main()
        except DataError as error:
            raise SystemExit(f"{pathlib.Path(sys.argv[0]).name}: {error}") from None  # several faults, a line each
        except (ConfigError, CheckpointError, TrainingDiverged, OSError) as error:
            raise _fail(error) from None

    app.run(guarded, flags_parser=_parse_flags)
