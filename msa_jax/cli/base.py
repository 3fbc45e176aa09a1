"""How every command ends: its status, what the user got wrong as one sentence, pipes that close, Ctrl-C."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from msa_jax.errors import MSAError


def one_line(message: object) -> str:
    """A message without its line breaks."""
    return " ".join(str(message).split())


def let_pipe_close() -> None:
    """After a `BrokenPipeError`: what is left to print goes nowhere, or the interpreter fails at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(name: str, work: Callable[[], int | None], *, interrupted: str = "interrupted.") -> int:
    """Do a command's work and return its exit status.

    0, or what `work` returns; 1 after one sentence on stderr for an `MSAError`, an `OSError`, or a kernel that this
    machine cannot run (`NotImplementedError`); 130 after Ctrl-C. Who closes the pipe that the command writes to has
    enough: that is no error.

    Args:
      name: what the sentence begins with.
      interrupted: what is said after Ctrl-C.
    """
    try:
        status = work()
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:
        let_pipe_close()
        return 0
    except (MSAError, OSError, NotImplementedError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
