"""Whose passages real questions are asked of: banks within one another, what is wanted of each, and BM25 on it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import bm25s
import numpy as np

from benchmarks.quality.bm25 import rank
from benchmarks.quality.questions_report import ALL_AT, RECALL_AT
from msa_jax.data import CorpusSource, Document, JsonlSource, Renderer, cut_documents
from msa_jax.data.splits import Split
from msa_jax.evaluation.retrieval import part_of, recall
from msa_jax.memory import MemoryBank

LISTED = 100
_CURVE = (1, 2, 3, 5, 7, 10, 16, 25, 40, 64, 100)


def read_passages(
    folders: list[pathlib.Path], eval_fraction: float, distractors: int | None, beside: list[pathlib.Path]
) -> tuple[CorpusSource, int]:
    """Passages of all folders, of those without questions only the first `distractors`; last those of `beside` alone.

    Also how many the last are.
    """
    source = JsonlSource([*folders, *beside], "eval", eval_fraction)
    known = {d.id for d in JsonlSource(folders, "eval", eval_fraction).documents}
    asked = [folder for folder in folders if (folder / "questions.jsonl").is_file()]
    own = {d.id for folder in asked for d in JsonlSource(folder, "eval", eval_fraction).documents}
    unasked = known - own
    others = [d for d in source.documents if d.id in unasked][:distractors]
    more = [d for d in source.documents if d.id not in known]
    return source.with_([d for d in source.documents if d.id in own] + others + more, source.questions), len(more)


def cut_passages(source: CorpusSource, renderer: Renderer, *, titles: bool) -> tuple[Sequence[Document], np.ndarray]:
    """Blocks [N] that the renderer takes, and which passage each is of, in order."""
    blocks = cut_documents(source, renderer.tokenizer, renderer.body_len, titles=titles).documents
    place = {document.id: i for i, document in enumerate(source.documents)}
    owners = (d.id if d.id in place else d.id.rpartition("/")[0] for d in blocks)
    return blocks, np.array([place[owner] for owner in owners])


def rank_bm25(texts: list[str], questions: list[str], count: int) -> list[list[int]]:
    """The best passages for each question by BM25, best first."""
    split = functools.partial(bm25s.tokenize, show_progress=False)
    return rank(split(texts), split(questions), count)


def scores_of(wanted: list[set[int]], list_at: Callable[[int], list[list[int]]]) -> dict:
    """Mean recall at several k, the share of questions whose passages are all among the first 16, and a curve.

    `list_at(k)` gives the passages that each question gets when k are asked for.
    """

    def shares(k):
        return [recall(ranking, found, k) for ranking, found in zip(list_at(k), wanted, strict=True)]

    row = {f"recall@{k}": float(np.mean(shares(k))) for k in RECALL_AT}
    row[f"all@{ALL_AT}"] = float(np.mean([share == 1 for share in shares(ALL_AT)]))
    return row | {"curve": [[k, round(float(np.mean(shares(k))), 4)] for k in _CURVE]}


@dataclasses.dataclass(frozen=True)
class Case:
    """One set's questions and one bank: `passages` [N] says which of `texts` each document of the bank is a block of,
    `wanted` which of them support each question; `bm25` ranks them."""

    row: dict
    bank: MemoryBank | None
    passages: np.ndarray
    questions: list[str]
    wanted: list[set[int]]
    bm25: list[list[int]]


def make_case(name: str, kind: str, bank, passages, texts, questions, wanted) -> Case:
    bm25 = rank_bm25(texts, questions, LISTED)
    methods = {"bm25": scores_of(wanted, lambda k: bm25)}
    row = {"set": name, "bank": kind, "questions": len(questions), "passages": len(texts), "methods": methods}
    return Case(row, bank, passages, questions, wanted, bm25)


@dataclasses.dataclass(frozen=True)
class Part:
    """A bank of the passages in `chosen`, in that order, of which `passages` [N] its documents are blocks."""

    chosen: np.ndarray
    bank: MemoryBank | None
    passages: np.ndarray


def choose(bank: MemoryBank | None, passages: np.ndarray, count: int, chosen: np.ndarray) -> Part:
    """Some of `count` passages, and of a bank whose documents are blocks of `passages` [N]."""
    if len(chosen) == count:
        return Part(chosen, bank, passages)
    local = np.full(count, -1)
    local[chosen] = np.arange(len(chosen))
    blocks = np.flatnonzero(local[passages] >= 0)
    return Part(chosen, part_of(bank, blocks) if bank else None, local[passages[blocks]])


def make_cases(
    folders: list[pathlib.Path],
    split: Split,
    eval_fraction: float,
    bank: MemoryBank | None,
    passages: np.ndarray,
    source: CorpusSource,
    beside: int = 0,
) -> Iterator[Case]:
    """Each set's questions of a split on the bank of its own passages and on that of all; without a bank, for BM25.

    The last `beside` passages are in a third bank only, of all and those.
    """
    place = {document.id: i for i, document in enumerate(source.documents)}
    texts = [text_of(document) for document in source.documents]
    every = np.arange(len(texts))
    shared = {"all": choose(bank, passages, len(texts), every[: len(texts) - beside])}
    if beside:
        shared["beside"] = choose(bank, passages, len(texts), every)
    for folder in folders:
        if not (folder / "questions.jsonl").is_file():
            continue
        own = JsonlSource(folder, split, eval_fraction)
        asked = [q.question for q in own.questions]
        mine = choose(bank, passages, len(texts), np.array([place[d.id] for d in own.documents]))
        for kind, part in {"own": mine, **shared}.items():
            local = {int(passage): i for i, passage in enumerate(part.chosen)}
            wanted = [{local[place[i]] for i in q.supporting_ids} for q in own.questions]
            chosen = [texts[i] for i in part.chosen]
            yield make_case(folder.name, kind, part.bank, part.passages, chosen, asked, wanted)


def text_of(document: Document) -> str:
    return f"{document.title}: {document.text}"
