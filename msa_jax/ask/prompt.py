"""Questions one after the other, at a prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from msa_jax.ask.show import write_end, write_explanation, write_stream
from msa_jax.inference.answer import Answer
from msa_jax.inference.settings import MODES, AskConfig

HELP = """\
Type a question. Ctrl-C gives an answer up, Ctrl-D or /quit ends.
/namespaces [NAME...]  read documents of these only; * for all; alone: which there are
/mode [MODE]           generate, router or latent
/explain [QUESTION]    which documents the router finds, and by what; alone: for the last question
/help                  this
"""


def answer_one(session, question: str, config: AskConfig, namespaces: Sequence[str] | None, out: TextIO) -> Answer:
    """Write one answer and its documents. KeyboardInterrupt gives the question up."""
    with contextlib.closing(session.stream(question, namespaces=namespaces, config=config)) as events:
        answer = write_stream(events, out)
    write_end(answer, out, width())
    return answer


def width() -> int:
    """Columns of the terminal; 80 if it has none."""
    return max(20, shutil.get_terminal_size().columns)


class Prompt:
    """The state of a prompt.

    Args:
      session: that is asked.
      config, namespaces: how, until commands change it.
      read: asks for a line; raises EOFError at the end.
      out: for answers.
    """

    def __init__(
        self,
        session,
        config: AskConfig,
        namespaces: Sequence[str] | None,
        *,
        read: Callable[[str], str] = input,
        out: TextIO = sys.stdout,
    ):
        self.session, self.config, self.namespaces = session, config, namespaces
        self._read, self._out = read, out
        self._last = ""

    def run(self) -> None:
        """Until the input ends or /quit."""
        self._out.write(HELP)
        while True:
            try:
                line = self._read("> ").strip()
            except EOFError:
                self._out.write("\n")
                return
            except KeyboardInterrupt:
                self._out.write("\n")
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                self._take(line)
            except KeyboardInterrupt:
                self._out.write("\n(given up)\n")
            except ValueError as error:  # a question that is refused
                self._out.write(f"{' '.join(str(error).split())}\n")

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not command.startswith("/"):
            if line:
                self._last = line
                answer_one(self.session, line, self.config, self.namespaces, self._out)
        elif command == "/namespaces":
            self._choose(rest)
        elif command == "/mode":
            if rest and rest not in MODES:
                self._out.write(f"There is no mode {rest}: use {', '.join(MODES)}.\n")
                return
            self.config = dataclasses.replace(self.config, mode=rest or self.config.mode)
            self._out.write(f"{self.config.mode}\n")
        elif command == "/explain":
            if not (rest or self._last):
                self._out.write("Ask something first, or give the question: /explain QUESTION\n")
                return
            explanation = self.session.explain(rest or self._last, namespaces=self.namespaces)
            write_explanation(explanation, self._out, width())
        else:
            self._out.write(HELP if command == "/help" else f"There is no command {command}; /help lists them.\n")

    def _choose(self, names: str) -> None:
        known = self.session.namespaces
        unknown = [name for name in names.split() if name not in ("*", *known)]
        if unknown:
            self._out.write(f"There is no namespace {unknown[0]}; there are {', '.join(known)}.\n")
            return
        if names:
            self.namespaces = None if "*" in names.split() else tuple(names.split())
        read = known if self.namespaces is None else self.namespaces
        rest = [name for name in known if name not in read]
        self._out.write(f"read: {', '.join(read)}" + (f"; not read: {', '.join(rest)}\n" if rest else "\n"))
