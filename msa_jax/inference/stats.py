"""A session in numbers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stats:
    """A session in numbers.

    Attributes:
      waiting, running: questions now. slots: how many can run.
      questions: that were answered or given up so far.
      prompt_tokens, completion_tokens: of those.
      documents: that can be read now; version: of the bank on disk, 0 of one in memory.
    """

    waiting: int
    running: int
    slots: int
    questions: int
    prompt_tokens: int
    completion_tokens: int
    documents: int
    version: int
