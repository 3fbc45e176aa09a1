"""The text of an answer as it grows: what may be shown already, and whether a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msa_jax.data.tokenizer import Tokenizer


class Reply:
    """An answer in the making.

    Attributes:
      text: all of it so far, without special tokens, the template's words before it, and space around it.
      stopped: a stop string came; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], on_text: Callable[[str], None]):
        """Begin; `on_text` is called with each piece of text that cannot change any more."""
        self._tokenizer, self._stop, self._on_text = tokenizer, stop, on_text
        before, _, _ = tokenizer.template.reply_answer.partition("{answer}")
        self._before = "".join(piece for special, piece in tokenizer.split_frame(before) if not special).strip()
        self._tokens: list[int] = []
        self._shown = 0
        self.text, self.stopped = "", False

    def write(self, tokens: Sequence[int]) -> None:
        """Add tokens; what comes after a stop string is dropped."""
        if not self.stopped:
            self._tokens += tokens
            self._read(self._tokenizer.decode(self._tokens, skip_special=True), over=False)

    def end(self) -> None:
        """No more comes: show the rest."""
        self._read(self._tokenizer.decode(self._tokens, skip_special=True), over=True)

    def say(self, text: str) -> None:
        """The text is this, which nobody wrote."""
        self.text = text
        self._on_text(text)

    def _read(self, whole: str, *, over: bool) -> None:
        text = whole.lstrip()
        if self._before and not over and self._before.startswith(text.rstrip("\ufffd").rstrip()):
            return  # the template's words may still be coming
        text = text.removeprefix(self._before).lstrip()
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        final = len(text) if over or self.stopped else len(text) - self._open(text)
        self.text = text[: len(text) if over or self.stopped else final].rstrip()
        if len(self.text) > self._shown:
            self._on_text(self.text[self._shown :])
            self._shown = len(self.text)

    def _open(self, text: str) -> int:
        """How many characters at the end may change: part of a character, or of a stop string."""
        whole = text.rstrip("\ufffd")
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(whole)), held, -1):
                if whole.endswith(stop[:size]):
                    held = size
                    break
        return held + len(text) - len(whole)
