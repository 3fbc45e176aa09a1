"""RULER's eight needle tasks as data (arXiv 2404.06654, appendix B), and the words that its keys are made of."""

import functools
import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from msa_jax.data.haystacks.uuids import draw_uuids
from msa_jax.data.records import Question
from msa_jax.errors import DataError

KEY_FORMAT = "{adjective}-{noun}"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
VALUE_DIGITS = 7
# Per cent of the haystack in front of a needle.
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)


@dataclass(frozen=True)
class RulerTask:
    """One task.

    Attributes:
      haystack: "noise" (one line of five sentences again and again), "essay" (real text), or "needles" (needles of
        other keys, a line each).
      key, value: what needles are made of.
      keys: needle keys in the haystack. values: needles of each. queries: keys that are asked for, all at once.
    """

    haystack: Literal["noise", "essay", "needles"] = "essay"
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def documents(self) -> int:
        """Needles that a question has in all, each in a document of its own."""
        return self.keys * self.values

    @property
    def wanted(self) -> int:
        """Values that are asked for."""
        return self.queries * self.values

    def needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."

    def question(self, keys: Sequence[str]) -> str:
        asked = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
        verb, what = ("are all", self.value) if self.wanted > 1 else ("is", self.value[:-1])
        return f"What {verb} the special magic {what} for {asked} mentioned in the provided text?"

    def draw_values(self, rng: np.random.Generator, count: int) -> list[str]:
        """Numbers of `VALUE_DIGITS` digits, the first of them not 0, or uuids."""
        if self.value == "uuids":
            return draw_uuids(rng, count)
        return [str(n) for n in rng.integers(10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS, count)]


TASKS = {
    "niah_single_1": RulerTask(haystack="noise"),
    "niah_single_2": RulerTask(),
    "niah_single_3": RulerTask(value="uuids"),
    "niah_multikey_1": RulerTask(keys=4),
    "niah_multikey_2": RulerTask(haystack="needles"),
    "niah_multikey_3": RulerTask(haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": RulerTask(values=4),
    "niah_multiquery": RulerTask(keys=4, queries=4),
}


def check_tasks(names: Sequence[str]) -> None:
    """Raises DataError unless there are tasks and all of them exist."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        said = f"there is no RULER task {unknown[0]!r}" if unknown else "no RULER task is given"
        raise DataError(f"{said}; the tasks are {', '.join(TASKS)}")


def ruler_words() -> dict[str, list[str]]:
    """Adjectives and nouns of the package wonderwords, sorted: those that RULER's keys are made of.

    Raises DataError when the package is not installed.
    """
    try:
        importlib.import_module("wonderwords")
    except ImportError:
        raise DataError(
            "RULER's keys are made of the words of the package wonderwords, which is not installed; "
            "install msa-jax[ruler]"
        ) from None
    return {name: list(own) for name, own in _words().items()}


@functools.cache
def _words() -> dict[str, tuple[str, ...]]:
    words = importlib.import_module("wonderwords").RandomWord()
    return {name: tuple(sorted(words.filter(include_categories=[name]))) for name in ("adjective", "noun")}


def ruler_texts(haystack_texts: Iterable[str]) -> Iterator[str]:
    """What to train a tokenizer on: the haystack, the frames, every word of keys so often that most become one
    token, and uuids enough for each of their 256 pairs."""
    yield from haystack_texts
    words = ruler_words()
    adjectives, nouns = words["adjective"], words["noun"]
    tasks = list(TASKS.values())
    for i in range(80 * len(nouns)):
        yield f" {adjectives[i % len(adjectives)]} -{nouns[i % len(nouns)]}"
    for i in range(4000):
        task = tasks[i % len(tasks)]
        key = f"{adjectives[i % len(adjectives)]}-{nouns[i % len(nouns)]}"
        yield " " + task.needle(key, "0")
        yield task.question([key] * task.queries)
        yield " " + NOISE
    yield from draw_uuids(np.random.default_rng(0), 20_000)


@dataclass(frozen=True)
class Asked:
    """Questions of one task before they have documents: keys [n][keys], values [n][keys * values], by key."""

    task: RulerTask
    keys: list[list[str]]
    values: list[list[str]]
    asked: np.ndarray  # int [n, queries], which keys are asked for

    def needles(self) -> list[str]:
        """All needles, question by question, key by key."""
        per_key = self.task.values
        return [
            self.task.needle(keys[j // per_key], value)
            for keys, values in zip(self.keys, self.values, strict=True)
            for j, value in enumerate(values)
        ]

    def question(self, i: int, name: str, numbers: Sequence[int]) -> Question:
        """The i-th question, its needles lying in the documents of these numbers.

        The documents are named, and the values listed, in the order of the documents' numbers: their order in the
        haystack is not known to a reader of documents that are encoded apart.
        """
        per_key = self.task.values
        keys = [self.keys[i][k] for k in self.asked[i]]
        wanted = [k * per_key + v for k in self.asked[i].tolist() for v in range(per_key)]
        wanted.sort(key=lambda j: numbers[j])
        values = tuple(self.values[i][j] for j in wanted)
        return Question(
            id=f"{name}:{':'.join(keys)}",
            question=self.task.question(keys),
            answers=(", ".join(values),),
            supporting_ids=tuple(str(numbers[j]) for j in wanted),
            wanted=values,
        )
