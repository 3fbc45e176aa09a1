"""What `train.py` and `eval.py` share: flags, log lines, and errors of the user's as one sentence.

Flags stand in a `FlagValues` of the command's own: those of a program that embeds this library, and those that
libraries define in `absl.flags.FLAGS`, are apart from them.
"""

from __future__ import annotations

import logging
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from msa_jax import distributed
from msa_jax.cli import processes
from msa_jax.cli.base import let_pipe_close, one_line
from msa_jax.cli.configs import with_paths
from msa_jax.config import RENAMED
from msa_jax.errors import DataError, MSAError

_HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}


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
    return f"{pathlib.Path(sys.argv[0]).name}: {one_line(message)}"


def _parsed(
    doc: str,
    define: Callable[[flags.FlagValues], None] | None,
    arguments: Sequence[str] | None,
    required: Sequence[str],
) -> flags.FlagValues:
    """What the command line says; ends the program for --help, and for a flag that cannot be."""
    argv = [sys.argv[0], *with_paths(sys.argv[1:] if arguments is None else arguments)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "A file with get_config(), or the name of a config that comes with this package; "
        "--config.NAME=VALUE sets a field of it.", flag_values=values, sys_argv=argv,
    )  # fmt: skip
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, tokenizer, logs.", flag_values=values)
    flags.mark_flags_as_required(required, flag_values=values)
    if define is not None:
        define(values)
    processes.define_flags(values)
    if _HELP & set(argv):
        print(f"{doc}\nflags:\n{values.get_help(include_special_flags=False)}")
        raise SystemExit(0)
    for old, new in RENAMED.items():
        if any(argument.lstrip("-").partition("=")[0] == f"config.model.{old}" for argument in argv):
            raise SystemExit(_line(f"--config.model.{old} is now --config.model.{new}."))
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, IndexError, FileNotFoundError) as error:
        # A config's fields are flags, and one that it lacks is no flags.Error.
        detail = str(error)
        while len(detail) > 1 and detail[0] in "'\"" and detail[-1] == detail[0]:
            detail = detail[1:-1]
        detail = f"the config has no field {detail!r}" if detail.isidentifier() else detail
        if "flag 'config." in detail and not any(one.lstrip("-").partition("=")[0] == "config" for one in argv):
            detail += "; fields are set of a config: give --config too"
        usage = "(--help lists flags; --config.NAME=VALUE sets a field of the config file)"
        raise SystemExit(_line(f"{detail} {usage}")) from None
    if rest[1:]:
        raise SystemExit(_line(f"unknown arguments {' '.join(rest[1:])}."))
    return values


def run_command(
    run: Callable[[flags.FlagValues], None],
    doc: str,
    define: Callable[[flags.FlagValues], None] | None = None,
    arguments: Sequence[str] | None = None,
    required: Sequence[str] = ("config", "workdir"),
) -> None:
    """Parse flags, join other processes and call `run`; a mistake of the user's ends in one sentence and status 1.

    Args:
      run: given the values of all flags, of which `config` and `workdir` are every command's.
      doc: what --help begins with.
      define: adds the command's own flags to the values that it is given.
      arguments: of the command line; None for those that the program was started with.
      required: flags that must be given.
    """
    try:
        values = _parsed(doc, define, arguments, required)
        processes.start(values)
        _show_log()
        run(values)
        sys.stdout.flush()
    except BrokenPipeError:
        let_pipe_close()
    except DataError as error:
        distributed.end(f"{pathlib.Path(sys.argv[0]).name}: {error}")  # several faults, a line each
    except (Exception, KeyboardInterrupt) as error:
        # A timeout of several processes is that of one waiting for another.
        waited = distributed.several() and isinstance(error, TimeoutError)
        if isinstance(error, (MSAError, OSError, NotImplementedError)) and not waited:
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
