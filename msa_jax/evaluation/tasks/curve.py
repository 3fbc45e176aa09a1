"""Needles in one memory of up to 100M tokens, whose beginnings are asked: what size alone does.

Every document carries a needle, and three quarters of the keys share their words with many others, as in training. The
haystack is the documentation of all installed packages, and what --folder adds. Scores, router recall and margins, the
router score of the right document above the best other one. With --set=steps=encode it only encodes, with
--set=steps=ask it asks what is there. A size that is done is kept at once, and the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from msa_jax.data import JsonlSource, NeedleSource, PythonDocsSource, Question, frequent_words
from msa_jax.errors import ConfigError
from msa_jax.evaluation.grown import GrownBank, grown_bank
from msa_jax.evaluation.plots import plot_curve
from msa_jax.evaluation.report import Column
from msa_jax.evaluation.scores import answer_scores, means
from msa_jax.evaluation.task import Inputs, Row, Task
from msa_jax.inference.answer import Answer
from msa_jax.inference.corpus import Corpus
from msa_jax.inference.engine import Engine
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig

ENGINE = EngineConfig(slots=16, prefill_rows=16, context=256, lengths=(48, 176), decode_steps=16)
_SAMPLE = 2048
# Questions that large sizes are asked, the first of all: each is compared with every chunk, twice.
_MOST = {4_194_304: 256, 16_777_216: 128}
_NAMESPACE = "curve"

COLUMNS = (
    Column("memory_tokens", "memory tokens", "{:,}"),
    Column("documents", "documents", "{:,}"),
    Column("questions", "questions", "{:,}"),
    Column("exact_match", "exact match"),
    Column("id_exact_match", "ids exact"),
    Column("router_recall@1", "router recall@1"),
    Column("router_recall@16", "recall@16"),
    Column("margin_mean", "margin, mean"),
    Column("margin_5th_percentile", "lowest 5 %"),
    Column("seconds_per_question", "s/question"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """`first`: tokens in which all questions' documents lie. `largest`: what the memory is drawn for;
    0: the largest size."""

    questions: int = 512
    first: int = 65_536
    largest: int = 0
    seed: int = 1
    steps: tuple[str, ...] = ("encode", "ask")


def run(inputs: Inputs) -> None:
    """A row for every size."""
    inputs.require_source("needles")
    settings = inputs.settings
    if unknown := set(settings.steps) - {"encode", "ask"}:
        raise ConfigError(f"--set=steps: there is no step {sorted(unknown)[0]!r}, there are encode and ask.")
    made_of = {name: getattr(settings, name) for name in ("questions", "first", "seed")}
    made_of |= {"largest": _largest(inputs), "folders": [folder.name for folder in inputs.folders]}
    sizes = [size for size in sorted(inputs.sizes) if not inputs.results.find(memory_tokens=size)]
    if not sizes:
        return
    questions, blocks = _memory(inputs)  # before a bank is made of it, which would stay
    bank = grown_bank(inputs, made_of)
    if "encode" in settings.steps:
        bank.fill(_NAMESPACE, blocks, tokens=max(sizes))
    for size in sizes if "ask" in settings.steps else ():
        most = min([settings.questions, *(count for least, count in _MOST.items() if size >= least)])
        inputs.results.add({"memory_tokens": size} | ask(inputs, bank, questions, size, most))


def _largest(inputs: Inputs) -> int:
    return inputs.settings.largest or max(inputs.sizes)


def _memory(inputs: Inputs):
    """Questions, and blocks of documents: keys that training never asked for, of its words, in all text there is."""
    data, renderer, settings = inputs.run.data, inputs.renderer, inputs.settings
    own = data.settings
    words = frequent_words(own.haystack(), renderer.tokenizer, own.num_words, own.key_format)
    texts = list(PythonDocsSource("train", packages=None).passages())
    texts += [d.text for folder in inputs.folders for d in JsonlSource(folder).documents]
    source = NeedleSource(
        texts, words, renderer.tokenizer,
        document_tokens=data.document_len, split="eval", eval_fraction=data.eval_fraction, key_format=own.key_format,
        hard_fraction=own.hard_fraction, needle_fraction=own.needle_fraction,
    )  # fmt: skip
    digits = renderer.tokenizer.template.id_digits
    _, some = source.memory(_SAMPLE, 0, np.random.default_rng(settings.seed), id_digits=digits)
    length = np.mean([len(renderer.render_document(d, n)) for block in some for d, n in zip(*block, strict=True)])
    count = int(1.005 * _largest(inputs) / length)
    return source.memory(
        count, settings.questions, np.random.default_rng(settings.seed), id_digits=digits,
        needle_documents=min(count, int(0.98 * settings.first / length)),
    )  # fmt: skip


def margins(wanted: Sequence[int], answers: Sequence[Answer]) -> list[list[float]]:
    """By how much each router layer scores the right document above the best other one, [questions][L_r]."""
    found = []
    for right, answer in zip(wanted, answers, strict=True):
        first = answer.rounds[0]
        hit = first.documents == right
        best = np.max(np.where(hit, -np.inf, first.scores), axis=1)
        # A right document that is not even among those reported is worse than the last of them.
        own = np.where(hit.any(axis=1), np.max(np.where(hit, first.scores, -np.inf), axis=1), first.scores[:, -1])
        found.append((own - best).tolist())
    return found


def ask(inputs: Inputs, bank: GrownBank, questions: Sequence[Question], size: int, most: int) -> Row:
    """Scores of a size, over all parts that its first `most` questions need."""
    scores, gaps, row = [], [], {"seconds_per_question": 0.0}
    for rows, asked in bank.parts(questions[:most], size, _NAMESPACE):
        some, begin = [questions[i] for i in asked], time.monotonic()
        about, answers, wanted = bank.ask(rows, _NAMESPACE, some, functools.partial(_answers, inputs))
        seconds = row["seconds_per_question"] + time.monotonic() - begin
        scores += [answer_scores(*one) for one in zip(some, wanted, answers, strict=True)]
        gaps += margins([min(numbers) for numbers in wanted], answers)
        row = about | {"seconds_per_question": seconds}
    return row | {
        "questions": len(scores),
        **means(scores),
        "margin_mean": np.mean(gaps, axis=0).round(4).tolist(),
        "margin_5th_percentile": np.percentile(gaps, 5, axis=0).round(4).tolist(),
        "seconds_per_question": row["seconds_per_question"] / len(scores),
    }


def _answers(inputs: Inputs, corpus: Corpus, questions: Sequence[Question]) -> list[Answer]:
    engine = Engine(inputs.model, inputs.renderer, corpus, ENGINE)
    config = AskConfig(mode=inputs.run.evaluation.mode, budget=Budget(rounds=2, turn_tokens=24, answer_tokens=24))
    answers = engine.ask([question.question for question in questions], config=config)
    return list(tqdm(answers, total=len(questions), desc=f"ask {len(corpus):,} documents", mininterval=5.0))


TASK = Task(run=run, columns=COLUMNS, settings=Settings, resumes=True, draw=plot_curve)
