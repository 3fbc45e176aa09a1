"""How a question is asked, and the shapes that an engine computes in: frozen dataclasses validated on construction."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from msa_jax.errors import require

Mode = Literal["generate", "constrained", "router", "latent"]
MODES: dict[Mode, str] = {
    "generate": "the model names the documents it wants, round by round (paper section 3.5)",
    "constrained": "the same, its numbers held to documents that a router layer selected in this round",
    "router": "the documents of the best router scores, the mean over router layers, are read, then it answers",
    "latent": "it answers from pooled keys and values, no original text is read",
}


def modes_help() -> str:
    """A line for each mode, for the help of commands."""
    return "\n".join(f"  {mode:<12} {what}" for mode, what in MODES.items())


def _need_at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        require(fits, f"{type(config).__name__}: {name} must be an integer of at least {least}, got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits.

    What is drawn depends on the seed and on how many tokens the question has so far, not on what else is asked.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token always.
      top_p: of the most likely tokens, as few as hold this much probability, in (0, 1].
      top_k: at most this many of the most likely tokens; 0 means all.
      seed: 0 to 2**32 - 1.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        require(
            isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf,
            f"Sampling: temperature must be a number of at least 0, got {self.temperature!r}.",
        )
        require(
            isinstance(self.top_p, int | float) and 0 < self.top_p <= 1,
            f"Sampling: top_p must be above 0 and at most 1, got {self.top_p!r}.",
        )
        _need_at_least(self, 0, "top_k", "seed")
        require(self.seed < 2**32, f"Sampling: seed must be below 2**32, got {self.seed}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What one question may cost.

    Attributes:
      rounds: how often it may retrieve.
      documents: how many documents may be read, over all rounds.
      document_tokens: of one document's text; what is longer is cut. None: as many as the context has room for.
      turn_tokens: of one turn in which the model names documents.
      answer_tokens: of the answer.
    """

    rounds: int = 4
    documents: int = 16
    document_tokens: int | None = None
    turn_tokens: int = 32
    answer_tokens: int = 128

    def __post_init__(self):
        _need_at_least(self, 1, "rounds", "documents", "turn_tokens", "answer_tokens")
        if self.document_tokens is not None:
            _need_at_least(self, 1, "document_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskConfig:
    """How a question is asked.

    Attributes:
      mode: how documents are found and read; `MODES` says what each mode does.
      sampling: of every token, ids included.
      budget: what it may cost.
      router_documents: how many documents "router" reads; `budget.documents` at most.
      given_documents: numbers of documents that "router" reads, in this order, instead of those: another retriever's
        choice, say. Numbers that the question may not see are passed over.
      stop: the answer ends before any of these strings.
      stop_tokens: and before any of these tokens, by id.
      abstain_below: if the best document's router score, the mean over router layers, is below it, the outcome is
        "not_in_memory", the text the template's `not_found`, and nothing is generated. None never abstains.
      timeout: seconds from submission until the question is given up; None never.
    """

    mode: Mode = "generate"
    sampling: Sampling = Sampling()
    budget: Budget = Budget()
    router_documents: int = 1
    given_documents: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    abstain_below: float | None = None
    timeout: float | None = None

    def __post_init__(self):
        require(self.mode in MODES, f"AskConfig: mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        _need_at_least(self, 1, "router_documents")
        given = self.given_documents
        require(
            isinstance(given, tuple) and all(type(n) is int for n in given) and (not given or self.mode == "router"),
            'AskConfig: given_documents must be a tuple of document numbers, and need mode "router", got '
            f"{given!r} in mode {self.mode!r}.",
        )
        require(
            isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
            f"AskConfig: stop must be a tuple of strings that are not empty, got {self.stop!r}.",
        )
        require(
            isinstance(self.stop_tokens, tuple) and all(type(t) is int and t >= 0 for t in self.stop_tokens),
            f"AskConfig: stop_tokens must be a tuple of token ids, got {self.stop_tokens!r}.",
        )
        for name in ("abstain_below", "timeout"):
            value = getattr(self, name)
            require(
                value is None or (isinstance(value, int | float) and math.isfinite(value)),
                f"AskConfig: {name} must be a number or None, got {value!r}.",
            )
        require(self.timeout is None or self.timeout > 0, f"AskConfig: timeout must be above 0, got {self.timeout!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The shapes that questions are computed in; each is compiled once.

    Attributes:
      slots: questions that decode together; others wait.
      context: tokens of one question at most: its text, the documents' it reads, and all that is written.
      lengths: prefills are padded to the next of these lengths, ascending; `context` is added to them.
      prefill_rows: questions that prefill together at most; a lone one prefills alone.
      decode_steps: tokens between two looks at what was written: what a stream is delayed by.
      reported_documents: best documents of every router layer that an answer reports.
    """

    slots: int = 8
    context: int = 512
    lengths: tuple[int, ...] = (32, 64, 128, 192, 256, 384)
    prefill_rows: int = 4
    decode_steps: int = 8
    reported_documents: int = 16

    def __post_init__(self):
        names = ("slots", "context", "prefill_rows", "decode_steps", "reported_documents")
        _need_at_least(self, 1, *names)
        integers = all(isinstance(n, int) and n >= 1 for n in self.lengths)
        require(
            integers and list(self.lengths) == sorted(set(self.lengths)),
            f"EngineConfig: lengths must be ascending integers of at least 1, got {self.lengths!r}.",
        )
        kept = tuple(n for n in self.lengths if n < self.context)
        object.__setattr__(self, "lengths", (*kept, self.context))

    def bucket(self, tokens: int) -> int:
        """The length that so many tokens, at most `context`, are padded to."""
        return next(n for n in self.lengths if n >= tokens)
