"""Real questions: how many of their supporting passages a trained router finds, BM25, and both together.

    python -m benchmarks.quality.questions --workdir runs/wiki

Passages and questions are those of the run's folders; asked is what its `eval_fraction` holds out, and training never
saw. Two banks for each set of questions: the set's own passages, and those of all folders. Of a passage that was cut
into blocks the best block counts. BM25 is bm25s as it comes (its defaults: Lucene's formula, k1 1.5, b 0.75, English
stop words, no stemming), over whole passages with their titles, indexed for each bank.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import time
from collections.abc import Callable

import bm25s
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.measure import environment, write_json
from msa_jax.data import JsonlSource, cut_documents
from msa_jax.evaluation.retrieval import (
    best_passages,
    encode_documents,
    fuse,
    halves,
    part_of,
    recall,
    router_scores,
)
from msa_jax.run_config import RunConfig
from msa_jax.trained import load_model

_RECALL = (1, 5, 10, 16)
_ALL_AT = 16
_LISTED = 100
_CURVE = (1, 2, 3, 5, 7, 10, 16, 25, 40, 64, 100)


def rank_bm25(texts: list[str], questions: list[str], count: int) -> list[list[int]]:
    """The best passages for each question by BM25, best first."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    asked = bm25s.tokenize(questions, show_progress=False)
    return index.retrieve(asked, k=min(count, len(texts)), show_progress=False).documents.tolist()


def rank_router(model, renderer, bank, passages, questions, *, mean_over_tokens) -> list[list[list[int]]]:
    """For each question the best passages of each router layer and of their mean."""
    found = {
        i: best_passages(scores, passages, _LISTED)
        for i, scores in router_scores(model, renderer, bank, questions, mean_over_tokens=mean_over_tokens)
    }
    return [found[i] for i in range(len(questions))]


def scores_of(wanted: list[set[int]], list_at: Callable[[int], list[list[int]]]) -> dict:
    """Mean recall at several k, the share of questions whose passages are all among the first 16, and a curve.

    `list_at(k)` gives the passages that each question gets when k are asked for.
    """

    def shares(k):
        return [recall(ranking, found, k) for ranking, found in zip(list_at(k), wanted, strict=True)]

    row = {f"recall@{k}": float(np.mean(shares(k))) for k in _RECALL}
    row[f"all@{_ALL_AT}"] = float(np.mean([share == 1 for share in shares(_ALL_AT)]))
    return row | {"curve": [[k, round(float(np.mean(shares(k))), 4)] for k in _CURVE]}


def compare(model, renderer, bank, passages, texts, questions, wanted, *, with_mean: bool) -> dict[str, dict]:
    """Scores by method of one set's questions on one bank; `passages` [N] numbers `texts`."""
    methods: dict[str, dict] = {}
    bm25 = rank_bm25(texts, questions, _LISTED)
    methods["bm25"] = scores_of(wanted, lambda k: bm25)
    for name, mean in (("router", False), ("router, mean over tokens", True)):
        if mean and not with_mean:
            continue
        ranked = rank_router(model, renderer, bank, passages, questions, mean_over_tokens=mean)
        layers = len(ranked[0]) - 1
        for layer in range(layers if layers > 1 else 0):
            own = [r[layer] for r in ranked]
            methods[f"{name}, layer {model.config.router_layers[layer]}"] = scores_of(wanted, lambda k, own=own: own)
        last = [r[-1] for r in ranked]
        both = list(zip(bm25, last, strict=True))
        fused = [fuse(pair) for pair in both]
        methods[name] = scores_of(wanted, lambda k, last=last: last)
        methods[f"bm25 + {name}, fused"] = scores_of(wanted, lambda k, fused=fused: fused)
        methods[f"bm25 + {name}, halves"] = scores_of(wanted, lambda k, both=both: [halves(*pair, k) for pair in both])
    return methods


def table(rows: list[dict]) -> str:
    names = [*(f"recall@{k}" for k in _RECALL), f"all@{_ALL_AT}"]
    lines = [f"| questions | bank | method | {' | '.join(names)} |", "|---|---|---|" + "---:|" * len(names)]
    for row in rows:
        for method, scores in row["methods"].items():
            cells = " | ".join(f"{scores[name]:.3f}" for name in names)
            where = f"{row['set']} ({row['questions']}) | {row['bank']} ({row['passages']:,})"
            lines.append(f"| {where} | {method} | {cells} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Recall@k over k on the bank of all passages, one panel a set."""
    shown = [row for row in rows if row["bank"] == "all"]
    figure = Figure(figsize=(3.6 * len(shown), 3.6), layout="constrained")
    for row, axes in zip(shown, np.atleast_1d(figure.subplots(1, len(shown), sharey=True)), strict=True):
        for style, name in zip(("o-", "s-", "^--"), ("bm25", "router", "bm25 + router, fused"), strict=True):
            axes.plot(*zip(*row["methods"][name]["curve"], strict=True), style, label=name, markersize=4)
        axes.set_xscale("log")
        axes.set(title=f"{row['set']}, {row['passages']:,} passages", xlabel="k", ylim=(0, 1))
        axes.set_xticks([1, 5, 10, 16, 40, 100], labels=["1", "5", "10", "16", "40", "100"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("recall of supporting passages")
    figure.axes[0].legend(frameon=False, loc="upper left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"savefig.dpi": 144}):
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="of a run of configs/wiki.py")
    parser.add_argument("--folders", default="", help="parted by commas; default: those of the run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/quality/questions.json"))
    parser.add_argument("--figure", type=pathlib.Path, help="picture to draw")
    parser.add_argument("--mean", action="store_true", help="score by the mean over routing tokens too")
    parser.add_argument("--seed", type=int, default=1, help="of document numbers")
    args = parser.parse_args()

    run = RunConfig.from_dict(json.loads((args.workdir / "config.json").read_text()))
    folders = [pathlib.Path(f) for f in args.folders.split(",") if f] or [pathlib.Path(f) for f in run.data.folders]
    model, renderer = load_model(run, args.workdir)
    source = JsonlSource(folders, "eval", run.data.eval_fraction)
    cut = cut_documents(source, renderer.tokenizer, renderer.body_len, titles=run.data.titles)
    place = {document.id: i for i, document in enumerate(source.documents)}
    passages = np.array([place[d.id] if d.id in place else place[d.id.rpartition("/")[0]] for d in cut.documents])
    texts = [f"{d.title}: {d.text}" for d in source.documents]
    begin = time.monotonic()
    bank = encode_documents(
        model, renderer, cut.documents, row_len=run.row_len(model.config.chunk_size), seed=args.seed
    )
    seconds = time.monotonic() - begin
    tokens = sum(map(len, renderer.tokenizer.encode_batch(texts)))

    rows = []
    for folder in folders:
        if not (folder / "questions.jsonl").is_file():
            continue
        own = JsonlSource(folder, "eval", run.data.eval_fraction)
        asked = [q.question for q in own.questions]
        wanted = [{place[i] for i in q.supporting_ids} for q in own.questions]
        mine = np.array([place[d.id] for d in own.documents])
        local = np.full(len(texts), -1)
        local[mine] = np.arange(len(mine))
        blocks = np.flatnonzero(local[passages] >= 0)
        cases = {
            "own": (part_of(bank, blocks), local[passages[blocks]], [texts[i] for i in mine],
                    [{int(local[i]) for i in w} for w in wanted]),
            "all": (bank, passages, texts, wanted),
        }  # fmt: skip
        for name, (part, owners, some, targets) in cases.items():
            methods = compare(model, renderer, part, owners, some, asked, targets, with_mean=args.mean)
            rows.append({"set": folder.name, "bank": name, "questions": len(asked), "passages": len(some)})
            rows[-1]["methods"] = methods
            print(table(rows[-1:]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "command": f"python -m benchmarks.quality.questions --workdir {args.workdir.name}" + " --mean" * args.mean,
        "seed": args.seed, "commit": commit, **environment(),
        "bm25s": bm25s.__version__, "passages": len(texts), "blocks": len(cut.documents), "tokens": tokens,
        "chunks": int(bank.layout.num_chunks), "encode_seconds": seconds, "rows": rows,
        "config": run.to_dict() | {"data": run.to_dict()["data"] | {"folder": ",".join(f.name for f in folders)}},
    }  # fmt: skip
    write_json(args.out, record)
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
