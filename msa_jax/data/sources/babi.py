"""bAbI (arXiv 1502.05698): short stories, and questions in the midst of them, in the set's own files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from msa_jax.data.records import Document, Episode, Question
from msa_jax.data.sources import SourceSettings
from msa_jax.data.splits import Split, check_split, in_split
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError, require

if TYPE_CHECKING:
    from msa_jax.data.batch_config import BatchConfig


@dataclass(frozen=True, kw_only=True)
class Settings(SourceSettings):
    """bAbI's stories, each question about its own.

    Attributes:
      folder: of the set's files, such as qa1_single-supporting-fact_train.txt.
      babi_tasks: numbers of its tasks.
    """

    folder: str = ""
    babi_tasks: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        given = self.folder and self.babi_tasks
        require(given, 'data.source "babi" needs data.folder, with its qa1_*_train.txt, and data.babi_tasks.')

    def texts(self, data: BatchConfig) -> Iterator[str]:
        return BabiSource(self.folder, self.babi_tasks, "train", data.eval_fraction).texts()

    def build(self, data: BatchConfig, tokenizer: Tokenizer, split: Split) -> BabiSource:
        return BabiSource(self.folder, self.babi_tasks, split, data.eval_fraction)


@dataclass(frozen=True, slots=True)
class Story:
    """One story.

    Attributes:
      id: such as "qa2:train:17".
      documents: its statements, in order. numbers: the line of each in the story, from 1, which tells time.
      questions: in order; `supporting_ids` in the file's order, which is the order of the steps.
      asked_at: line of each question: it is about the statements before it.
    """

    id: str
    documents: list[Document]
    numbers: list[int]
    questions: list[Question]
    asked_at: list[int]


def read_stories(folder: str | Path, task: int, part: Literal["train", "test"]) -> list[Story]:
    """The stories of `qa{task}_*_{part}.txt` in a folder.

    Raises:
      DataError: there is no such file or more than one, or a line is not in the set's format (it is named).
    """
    paths = sorted(Path(folder).glob(f"qa{task}_*_{part}.txt"))
    if len(paths) != 1:
        raise DataError(
            f"{folder} must hold one qa{task}_*_{part}.txt and has {len(paths)}; give the folder of bAbI's files, such "
            "as en-10k"
        )
    stories: list[Story] = []
    for row, line in enumerate(paths[0].read_text("utf-8").splitlines(), 1):
        try:
            number, rest = line.split(" ", 1)
            at = int(number)
            if at == 1:
                stories.append(Story(f"qa{task}:{part}:{len(stories)}", [], [], [], []))
            story = stories[-1]
            name = f"{story.id}:{at}"
            if "\t" not in rest:
                story.documents.append(Document(name, "", rest.strip()))
                story.numbers.append(at)
                continue
            asked, answer, supporting = rest.split("\t")
            lines = [int(i) for i in supporting.split()]
            if not set(lines) <= set(story.numbers):
                raise ValueError(f"supporting lines {lines}")
        except (ValueError, IndexError):
            raise DataError(
                f"{paths[0]}:{row}: not in bAbI's format, {line[:60]!r}; a line is '1 Statement.' or, with tabs, "
                "'2 Question? <tab> answer <tab> lines of earlier statements', and stories begin at 1"
            ) from None
        ids = tuple(f"{story.id}:{i}" for i in lines)
        story.questions.append(Question(name, asked.strip(), (answer.strip(),), ids))
        story.asked_at.append(at)
    return [story for story in stories if story.questions]


class BabiSource:
    """Every statement a document, numbered by its line; a question sees its own story's earlier statements alone.

    A slot is a story. Splits are of the training files, decided by the hash of a story's text.

    Args:
      folder: that holds the set's files.
      tasks: numbers of the tasks, their stories together.
    Raises:
      DataError: as `read_stories`, or a split without stories.
    """

    def __init__(self, folder: str | Path, tasks: Sequence[int], split: Split = "train", eval_fraction: float = 0.1):
        check_split(split, eval_fraction)
        stories = [story for task in tasks for story in read_stories(folder, task, "train")]
        text = lambda story: "\n".join(d.text for d in story.documents)  # noqa: E731
        self.stories = [story for story in stories if in_split(text(story), split, eval_fraction)]
        if not self.stories:
            raise DataError(f"none of {len(stories)} stories is in the {split} split; change eval_fraction")

    def __len__(self) -> int:
        return len(self.stories)

    def texts(self) -> Iterator[str]:
        """Statements, questions and answers, as they are rendered."""
        for story in self.stories:
            yield from (" " + document.text for document in story.documents)
            for question in story.questions:
                yield question.question
                yield question.answers[0]

    def episode(
        self, indices: Sequence[int], num_documents: int, rng: np.random.Generator, id_digits: int = 7
    ) -> Episode:
        """As many of the stories at `indices` as fit `num_documents`, and `len(indices)` questions about them.

        Documents are encoded once for all questions about a story, so there may be fewer stories than questions:
        all their questions are asked equally often, or once more. Room that is left holds statements of other
        stories, which no question sees. Numbers are lines, whatever `id_digits` allows.
        Raises DataError when no story fits, or all together are too short.
        """
        chosen: list[int] = []
        room = num_documents
        for i in dict.fromkeys(indices):
            size = len(self.stories[i].documents)
            if size <= room:
                chosen.append(i)
                room -= size
        if not chosen:
            shortest = min(len(self.stories[i].documents) for i in indices)
            raise DataError(
                f"no story fits num_documents {num_documents}: the shortest of {len(indices)} has {shortest} "
                f"statements; raise num_documents to {shortest} or more"
            )
        shown = [self.stories[i] for i in chosen]
        documents = [document for story in shown for document in story.documents]
        numbers = [number for story in shown for number in story.numbers]
        owner = np.repeat(np.arange(len(shown)), [len(story.documents) for story in shown])
        for i in rng.permutation(len(self)) if room else ():
            if i in chosen:
                continue
            other = self.stories[i]
            documents += other.documents[:room]
            numbers += other.numbers[:room]
            room = num_documents - len(documents)
            if not room:
                break
        if room:
            raise DataError(f"num_documents is {num_documents} and there are {len(documents)} statements; lower it")
        owner = np.pad(owner, (0, num_documents - len(owner)), constant_values=-1)
        pairs = [(s, q) for s, story in enumerate(shown) for q in range(len(story.questions))]
        order = np.concatenate([rng.permutation(len(pairs)) for _ in range(-(-len(indices) // len(pairs)))])
        asked = [pairs[i] for i in order[: len(indices)]]
        at = np.array([shown[s].asked_at[q] for s, q in asked])
        visible = (owner == np.array([s for s, _ in asked])[:, None]) & (np.array(numbers) < at[:, None])
        return Episode(documents, numbers, [shown[s].questions[q] for s, q in asked], visible)

    def memory(self, num_documents: int, num_questions: int, rng: np.random.Generator, *, id_digits: int = 7):
        """Raises DataError: every question has a memory of its own, so there is none to grow."""
        raise DataError(
            "bAbI's questions see the statements of their own story, so there is no memory of a given size; evaluate "
            "with eval.py --task=babi"
        )
