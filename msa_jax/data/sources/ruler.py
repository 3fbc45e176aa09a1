"""RULER's eight needle tasks (arXiv 2404.06654): memories of one task, and training episodes that mix them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from msa_jax.data.haystacks.keys import KeyPool
from msa_jax.data.haystacks.ruler_documents import RulerDocuments
from msa_jax.data.haystacks.ruler_tasks import (
    DEPTHS,
    KEY_FORMAT,
    TASKS,
    Asked,
    RulerTask,
    check_tasks,
    ruler_texts,
    ruler_words,
)
from msa_jax.data.haystacks.settings import HaystackSettings
from msa_jax.data.haystacks.uuids import draw_uuids, word_pattern
from msa_jax.data.records import Document, Episode, Question
from msa_jax.data.splits import Split, check_split, draw_numbers
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError

if TYPE_CHECKING:
    from msa_jax.data.batch_config import BatchConfig

Blocks = Iterator[tuple[list[Document], list[int]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(HaystackSettings):
    """RULER's needle tasks.

    Attributes:
      ruler_tasks: the tasks that are asked; a memory that eval.py makes is of one task.
      uuid_pairs: the tokenizer cuts uuids into pairs of digits, 20 tokens with the hyphens.
    """

    must_act: ClassVar[tuple[str, ...]] = ("uuid_pairs",)
    ruler_tasks: tuple[str, ...] = tuple(TASKS)
    uuid_pairs: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_tasks(self.ruler_tasks)

    @property
    def word_pattern(self) -> str | None:
        return word_pattern() if self.uuid_pairs else None

    def texts(self, data: BatchConfig) -> Iterator[str]:
        return ruler_texts(self.haystack())

    def build(self, data: BatchConfig, tokenizer: Tokenizer, split: Split) -> RulerSource:
        return RulerSource(
            self.haystack(), tokenizer,
            document_tokens=data.document_len, tasks=self.ruler_tasks, split=split, eval_fraction=data.eval_fraction,
            hard_fraction=self.hard_fraction, needle_fraction=self.needle_fraction,
        )  # fmt: skip


class RulerSource:
    """Documents with RULER's needles, and the questions of its tasks.

    A haystack of text is cut into passages that are documents with their needle, if they carry one; a haystack of
    noise into documents of whole lines; a haystack of needles into one needle a document. Texts are split by stable
    hash, and so are keys of words: no key that eval asks for occurs in training. `hard_fraction` and
    `needle_fraction` are for episodes: of the keys that share words with many others, and of the documents not asked
    for that carry needles. Memories have the benchmark's: keys all at random, and no needles but the task's.
    Raises DataError when a task is unknown, wonderwords is not installed, needles do not fit `document_tokens`, or
    the split has too little text.
    """

    def __init__(
        self,
        haystack_texts: Iterable[str],
        tokenizer: Tokenizer,
        *,
        document_tokens: int,
        tasks: Sequence[str] = tuple(TASKS),
        split: Split = "train",
        eval_fraction: float = 0.1,
        hard_fraction: float = 0.75,
        needle_fraction: float = 1.0,
    ):
        check_split(split, eval_fraction)
        check_tasks(tasks)
        self.tasks = tuple(tasks)
        self.keys = KeyPool(ruler_words(), KEY_FORMAT, split, eval_fraction)
        self._split = split
        self._hard_fraction, self._needle_fraction = hard_fraction, needle_fraction
        self._made = RulerDocuments(list(haystack_texts), tokenizer, document_tokens, split, eval_fraction)
        self._made.check_needles(self.tasks, dict(zip(self.keys.fields, self.keys.words, strict=True)))

    def __len__(self) -> int:
        """Passages of the text. What a slot asks is drawn anew each time; only the tasks depend on it."""
        return len(self._made.passages)

    def episode(
        self, indices: Sequence[int], num_documents: int, rng: np.random.Generator, id_digits: int = 7
    ) -> Episode:
        """See `Source.episode`. The questions go through the tasks in turn, from one that the first index decides."""
        first = indices[0] if indices else 0
        names = [self.tasks[(first + i) % len(self.tasks)] for i in range(len(indices))]
        tasks = [TASKS[name] for name in names]
        needed = sum(task.documents for task in tasks)
        if needed > num_documents:
            raise DataError(
                f"{len(indices)} questions of RULER's tasks have {needed} needles, each in a document of its own, and "
                f"num_documents is {num_documents}; raise it or lower num_questions"
            )
        if num_documents > len(self):
            raise DataError(
                f"num_documents is {num_documents} and the {self._split} split has {len(self)} passages; give more "
                "haystack text, or use RulerSource.memory, which goes through the text again"
            )
        others = [TASKS[name] for name in rng.choice(self.tasks, num_documents - needed).tolist()]
        carries = [t.haystack == "needles" or rng.random() < self._needle_fraction for t in others]
        keys = self._draw_keys(rng, tasks, [t for t, c in zip(others, carries, strict=True) if c], self._hard_fraction)
        asked = [self._ask(rng, task, [[next(keys[0]) for _ in range(task.keys)]]) for task in tasks]
        plan = [(a.task.haystack, needle) for a in asked for needle in a.needles()]
        for task, carrying in zip(others, carries, strict=True):
            needle = task.needle(next(keys[1][task.key]), task.draw_values(rng, 1)[0]) if carrying else ""
            plan.append((task.haystack, needle))
        numbers = draw_numbers(rng, num_documents, id_digits).tolist()
        passages = rng.choice(len(self), num_documents, replace=False)
        order = rng.permutation(num_documents).tolist()
        documents: list[Document] = [None] * num_documents
        for haystack in dict.fromkeys(h for h, _ in plan):  # in an order that is the same in every process
            some = [i for i, (h, _) in enumerate(plan) if h == haystack]
            bodies = self._made.bodies(rng, haystack, self._made.passages, passages[some], [plan[i][1] for i in some])
            for i, document in zip(some, self._made.documents([numbers[i] for i in some], bodies), strict=True):
                documents[i] = document
        ends = np.cumsum([task.documents for task in tasks]).tolist()
        questions = [
            a.question(0, name, numbers[end - a.task.documents : end])
            for a, name, end in zip(asked, names, ends, strict=True)
        ]
        return Episode([documents[i] for i in order], [numbers[i] for i in order], questions)

    def memory(
        self,
        num_documents: int,
        num_questions: int,
        rng: np.random.Generator,
        *,
        id_digits: int = 7,
        task: str | None = None,
        block_size: int = 4096,
        numbers: np.ndarray | None = None,
    ) -> tuple[list[Question], Blocks]:
        """See `Source.memory`: a haystack of one task, which all questions share, made as its blocks are asked for.

        Needles lie as in the benchmark: in text at depths drawn from its 40, of each question's own, otherwise at
        random. Where a document carries a needle already the nearest that does not takes it.

        Args:
          task: default the only one of the source.
          numbers: of the documents, int64 [num_documents]; default drawn.

        Raises:
          DataError: there is no such task, or more needles than documents.
        """
        if task is None and len(self.tasks) > 1:
            raise DataError(f"a memory is one RULER task's and the source has {len(self.tasks)}; choose one of them")
        name = task or self.tasks[0]
        check_tasks([name])
        kind = TASKS[name]
        needed = num_questions * kind.documents
        if needed > num_documents:
            raise DataError(
                f"{num_questions} questions of {name} have {needed} needles, each in a document of its own, and there "
                f"are {num_documents} documents; ask for more memory or fewer questions"
            )
        drawn, _ = self._draw_keys(rng, [kind] * num_questions, [], 0.0)
        asked = self._ask(rng, kind, [[next(drawn) for _ in range(kind.keys)] for _ in range(num_questions)])
        places = self._places(rng, kind, num_questions, num_documents)
        if numbers is None:
            numbers = draw_numbers(rng, num_documents, id_digits)
        own = numbers[places].tolist()
        size = kind.documents
        questions = [asked.question(i, name, own[i * size : (i + 1) * size]) for i in range(num_questions)]
        needles = dict(zip(places.tolist(), asked.needles(), strict=True))
        avoid = {key for keys in asked.keys for key in keys}
        later = np.random.default_rng(rng.integers(0, 2**63, 2))  # blocks are made when the caller likes
        return questions, self._blocks(later, kind, numbers, needles, avoid, block_size)

    def haystack(
        self, task: str, numbers: np.ndarray, rng: np.random.Generator, *, questions: Sequence[Question] = (),
        block_size: int = 4096,
    ) -> Blocks:  # fmt: skip
        """More of a task's haystack, to lie behind a memory, in blocks: documents of these numbers, int64.

        A haystack of needles has none for keys that `questions`, of `memory`, ask for.
        """
        avoid = {key for question in questions for key in question.id.split(":")[1:]}
        return self._blocks(rng, TASKS[task], numbers, {}, avoid, block_size)

    def _blocks(
        self, rng: np.random.Generator, kind: RulerTask, numbers: np.ndarray, needles: dict[int, str],
        avoid: set[str], block_size: int,
    ) -> Blocks:  # fmt: skip
        begin = 0
        for passages, chosen in self._made.stretches(rng, kind.haystack, len(numbers), block_size):
            end = begin + len(chosen)
            texts = [needles.get(i, "") for i in range(begin, end)]
            if kind.haystack == "needles":
                lines = iter(self._other_needles(rng, kind, texts.count(""), avoid))
                texts = [text or next(lines) for text in texts]
            some = numbers[begin:end].tolist()
            yield self._made.documents(some, self._made.bodies(rng, kind.haystack, passages, chosen, texts)), some
            begin = end

    def _draw_keys(
        self, rng: np.random.Generator, tasks: Sequence[RulerTask], others: Sequence[RulerTask], hard_fraction: float
    ) -> tuple[Iterator[str], dict[str, Iterator[str]]]:
        """Keys of the questions of `tasks`, in their order, and of the needles of `others`, by kind of key."""
        asked = {kind: sum(t.keys for t in tasks if t.key == kind) for kind in ("words", "uuids")}
        more = {kind: sum(t.key == kind for t in others) for kind in asked}
        keys = {
            "words": self.keys.format(self.keys.draw(rng, asked["words"], more["words"], hard_fraction)),
            "uuids": draw_uuids(rng, asked["uuids"] + more["uuids"]),
        }
        own = {kind: iter(keys[kind][:count]) for kind, count in asked.items()}
        rest = {kind: iter(keys[kind][count:]) for kind, count in asked.items()}
        return iter([next(own[task.key]) for task in tasks for _ in range(task.keys)]), rest

    @staticmethod
    def _ask(rng: np.random.Generator, task: RulerTask, keys: list[list[str]]) -> Asked:
        count, each = len(keys), task.documents
        values = task.draw_values(rng, count * each)
        asked = rng.permuted(np.tile(np.arange(task.keys), (count, 1)), axis=1)[:, : task.queries]
        return Asked(task, keys, [values[i * each : (i + 1) * each] for i in range(count)], asked)

    @staticmethod
    def _places(rng: np.random.Generator, task: RulerTask, count: int, documents: int) -> np.ndarray:
        """The documents that carry the needles of `count` questions, all different, int64 [count * needles]."""
        if task.haystack != "essay":
            return rng.permutation(documents)[: count * task.documents]
        free = np.ones(documents, bool)
        places = []
        for _ in range(count):
            for depth in rng.choice(DEPTHS, task.documents, replace=False):
                wanted = round(int(depth) / 100 * (documents - 1))
                # The nearest free document lies within as many as there are taken ones.
                low, high = max(0, wanted - len(places)), min(documents, wanted + len(places) + 1)
                near = low + np.flatnonzero(free[low:high])
                places.append(int(near[np.argmin(np.abs(near - wanted))]))
                free[places[-1]] = False
        return np.array(places, np.int64)

    def _other_needles(self, rng: np.random.Generator, task: RulerTask, count: int, avoid: set[str]) -> list[str]:
        """Needles of keys at random, but none that is asked for."""
        keys: list[str] = []
        while len(keys) < count:
            missing = count - len(keys)
            if task.key == "uuids":
                drawn = draw_uuids(rng, missing)
            else:
                drawn = self.keys.format(np.stack([rng.integers(0, len(w), missing) for w in self.keys.words], -1))
            keys += [key for key in drawn if key not in avoid]
        values = task.draw_values(rng, count)
        return [task.needle(key, value) for key, value in zip(keys, values, strict=True)]
