"""What the entry points share: log lines, and errors of the user's as one sentence."""

from __future__ import annotations

import logging
import pathlib
import sys
import traceback
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging

from msa_jax import distributed
from msa_jax.cli import processes
from msa_jax.errors import DataError, MSAError


def _show_log() -> None:
    """Print this project's log lines to stderr (those of process 0), and of its libraries only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    log = logging.getLogger("msa_jax")
    log.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.propagate = False


def _line(message: object) -> str:
    """The message on one line, after the command's name."""
    return f"{pathlib.Path(sys.argv[0]).name}: {' '.join(str(message).split())}"


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, IndexError, FileNotFoundError) as error:
        # A config's fields are flags, and one that it lacks is no flags.Error.
        detail = str(error).strip("\"'")
        detail = f"the config has no field {detail!r}" if detail.isidentifier() else detail
        usage = "(--help lists flags; --config.NAME=VALUE sets a field of the config file)"
        raise SystemExit(_line(f"{detail} {usage}")) from None
    if rest[1:]:
        raise SystemExit(_line(f"unknown arguments {' '.join(rest[1:])}."))
    return rest


def run_command(main: Callable[[], None]) -> None:
    """Parse flags, join other processes and call `main`; a mistake of the user's ends in one sentence and status 1."""

    def guarded(_):
        try:
            processes.start()
            _show_log()
            main()
        except DataError as error:
            distributed.end(f"{pathlib.Path(sys.argv[0]).name}: {error}")  # several faults, a line each
        except (Exception, KeyboardInterrupt) as error:
            # A timeout of several processes is that of one waiting for another.
            waited = distributed.several() and isinstance(error, TimeoutError)
            if isinstance(error, (MSAError, OSError)) and not waited:
                distributed.end(_line(error))
            if not distributed.several():
                raise
            traceback.print_exc()
            distributed.end(
                _line(
                    f"stopped by {type(error).__name__}. If it tells of a lost connection or a timeout, another "
                    "process has ended, and its output says why. The same command in all processes goes on from the "
                    "last checkpoint."
                )
            )

    app.run(guarded, flags_parser=_parse_flags)
