"""Folders of documents and questions: recall of the supporting documents by BM25, the router, and both together.

Without --workdir it is BM25 alone. Folders are those of --folder, or those of the run. Of a folder that the run was
trained on the questions that training never saw are asked, of any other all. Each set of questions is asked on its own
folder's documents, and on those of all folders. A document that is too long is cut into blocks, of which the best
counts. "router+bm25" is reciprocal rank fusion of the two.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from msa_jax.data import JsonlSource, cut_documents
from msa_jax.data.sources.jsonl import Settings as JsonlSettings
from msa_jax.errors import ConfigError
from msa_jax.evaluation import baselines
from msa_jax.evaluation.report import Column
from msa_jax.evaluation.retrieval import best_passages, encode_documents, fuse, part_of, router_scores
from msa_jax.evaluation.scores import recall
from msa_jax.evaluation.task import Inputs, Row, Task
from msa_jax.memory import MemoryBank

RECALL_AT = (1, 2, 5, 10, 16)
_LISTED = 100
# A split has less than all; this leaves out one question of 10^12.
_ALL = 1 - 2.0**-40

COLUMNS = (
    Column("set", "questions of", "{}"),
    Column("questions", "questions", "{:,}"),
    Column("bank", "bank", "{}"),
    Column("documents", "documents", "{:,}"),
    Column("retriever", "retriever", "{}"),
    *(Column(f"recall@{k}", f"recall@{k}, %", "{:.1f}") for k in RECALL_AT),
    Column("all@16", "all@16, %", "{:.1f}"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """`seed`: of document numbers."""

    seed: int = 1


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Documents of a corpus [n], by their index there, in a bank whose documents are blocks of them: `owners` [N]."""

    chosen: np.ndarray
    bank: MemoryBank | None = None
    owners: np.ndarray | None = None

    def of(self, chosen: np.ndarray) -> Blocks:
        """Some of all documents of a corpus."""
        if self.bank is None or len(chosen) == len(self.chosen):
            return Blocks(chosen, self.bank, self.owners)
        local = np.full(len(self.chosen), -1)
        local[chosen] = np.arange(len(chosen))
        blocks = np.flatnonzero(local[self.owners] >= 0)
        return Blocks(chosen, part_of(self.bank, blocks), local[self.owners[blocks]])


def run(inputs: Inputs) -> None:
    """A row for every set of questions, bank and retriever; recall is in percent."""
    folders = list(inputs.folders) or _trained_on(inputs)
    asked = [folder for folder in folders if (folder / "questions.jsonl").is_file()]
    if not folders:
        raise ConfigError("--task=questions reads documents.jsonl and questions.jsonl: give --folder=DIR.")
    if not asked:
        raise ConfigError(f"{', '.join(map(str, folders))}: no folder has a questions.jsonl; give one that has.")
    corpus = JsonlSource(folders, "eval", _ALL)
    place = {document.id: i for i, document in enumerate(corpus.documents)}
    whole = Blocks(np.arange(len(place)))
    if inputs.model is not None:
        whole = _encoded(inputs, corpus, place)
    for folder in asked:
        own = JsonlSource(folder, "eval", _held_out(inputs, folder))
        banks = {"own": whole.of(np.array([place[d.id] for d in own.documents]))}
        if len(folders) > 1:
            banks["all"] = whole
        for name, blocks in banks.items():
            row = {"set": folder.name, "bank": name, "questions": len(own.questions), "documents": len(blocks.chosen)}
            local = {int(i): n for n, i in enumerate(blocks.chosen)}
            wanted = [{local[place[i]] for i in q.supporting_ids} for q in own.questions]
            texts = [f"{corpus.documents[i].title}: {corpus.documents[i].text}" for i in blocks.chosen]
            for retriever, found in _ranked(inputs, blocks, texts, [q.question for q in own.questions]).items():
                inputs.results.add(row | {"retriever": retriever} | _scores(found, wanted))


def _held_out(inputs: Inputs, folder: pathlib.Path) -> float:
    trained = [known.resolve() for known in _trained_on(inputs)]
    return inputs.run.data.eval_fraction if folder.resolve() in trained else _ALL


def _trained_on(inputs: Inputs) -> list[pathlib.Path]:
    """Folders of a run of data.source "jsonl"."""
    own = None if inputs.run is None else inputs.run.data.settings
    return [pathlib.Path(folder) for folder in own.folders] if isinstance(own, JsonlSettings) else []


def _encoded(inputs: Inputs, corpus: JsonlSource, place: dict[str, int]) -> Blocks:
    renderer, chunk_size = inputs.renderer, inputs.model.config.chunk_size
    titles = getattr(inputs.run.data.settings, "titles", False)
    blocks = cut_documents(corpus, renderer.tokenizer, renderer.body_len, titles=titles).documents
    row_len = inputs.run.row_len(chunk_size)
    bank = encode_documents(inputs.model, renderer, blocks, row_len=row_len, seed=inputs.settings.seed)
    owners = [place[d.id if d.id in place else d.id.rpartition("/")[0]] for d in blocks]
    return Blocks(np.arange(len(place)), bank, np.array(owners))


def _ranked(inputs: Inputs, blocks: Blocks, texts: list[str], questions: list[str]) -> dict[str, list[list[int]]]:
    """The best documents for each question, by retriever."""
    tokenizer = None if inputs.renderer is None else inputs.renderer.tokenizer
    found = {
        name: baselines.rank(name, texts, questions, count=_LISTED, tokenizer=tokenizer, keys=False)
        for name in dict.fromkeys(("bm25", *inputs.baselines))
    }
    if blocks.bank is None:
        return found
    ranked = {
        i: best_passages(scores, blocks.owners, _LISTED)
        for i, scores in router_scores(inputs.model, inputs.renderer, blocks.bank, questions)
    }
    layers = len(ranked[0]) - 1
    for layer in range(layers if layers > 1 else 0):
        name = f"router, layer {inputs.model.config.router_layers[layer]}"
        found[name] = [ranked[i][layer] for i in range(len(questions))]
    found["router"] = [ranked[i][-1] for i in range(len(questions))]
    found["router+bm25"] = [fuse(pair) for pair in zip(found["bm25"], found["router"], strict=True)]
    return found


def _scores(found: Sequence[Sequence[int]], wanted: Sequence[set[int]]) -> Row:
    """Mean recall and the share of questions whose documents are all among the first 16, in percent."""
    shares = {k: [recall(one, some, k) for one, some in zip(found, wanted, strict=True)] for k in RECALL_AT}
    row = {f"recall@{k}": round(100 * float(np.mean(values)), 2) for k, values in shares.items()}
    return row | {"all@16": round(100 * float(np.mean(np.array(shares[16]) == 1)), 2)}


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Recall@k over k, one panel for every set and its largest bank."""
    shown = {row["set"]: row["bank"] for row in rows}
    figure = Figure(figsize=(3.6 * len(shown), 3.6), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for (name, bank), axes in zip(shown.items(), panels, strict=True):
        mine = [row for row in rows if (row["set"], row["bank"]) == (name, bank)]
        for row in mine:
            axes.plot(RECALL_AT, [row[f"recall@{k}"] for k in RECALL_AT], "o-", label=row["retriever"], markersize=4)
        axes.set(title=f"{name}, {mine[0]['documents']:,} documents", xlabel="k", ylim=(0, 100))
        axes.set_xticks(RECALL_AT)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("recall of supporting documents, %")
    figure.axes[0].legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(path, dpi=144)


TASK = Task(
    run=run, columns=COLUMNS, settings=Settings, baselines=tuple(baselines.RANKERS), needs_run=False, draw=draw
)  # fmt: skip
