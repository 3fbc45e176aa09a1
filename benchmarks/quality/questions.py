"""Real questions: how many of their supporting passages a trained router finds, BM25, and both together.

    python -m benchmarks.quality.questions --workdir runs/wiki
    python -m benchmarks.quality.questions --folders DIR,DIR,...

The second form is BM25 alone. Passages and questions are those of the run's folders, or of `--folders`; asked is what
`eval_fraction` holds out, and training never saw. `--split train` asks the other questions, of which what is not
trained must know nothing either: the start that training goes on from, and BM25. Two banks for each set of questions:
the set's own passages, and those of all folders; with `--beside` a third, of what these folders hold as well. Of a
passage that was cut into blocks the best block counts. BM25 is bm25s as it comes (its defaults: Lucene's formula, k1
1.5, b 0.75, English stop words, no stemming), over whole passages with their titles, indexed for each bank.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import time
from collections.abc import Iterable

import bm25s
import numpy as np

from benchmarks.measure import commit, environment, write_json
from benchmarks.quality.questions_cases import (
    LISTED,
    Case,
    cut_passages,
    make_cases,
    read_passages,
    scores_of,
    text_of,
)
from benchmarks.quality.questions_report import draw, table
from msa_jax.checkpoints.run import Checkpoints
from msa_jax.data import Renderer
from msa_jax.errors import MSAError
from msa_jax.evaluation.retrieval import best_passages, encode_documents, fuse, halves, router_scores
from msa_jax.runs.build import make_model, open_tokenizer
from msa_jax.runs.open import load_model, open_run


def rank_router(model, renderer, bank, passages, questions, *, mean_over_tokens) -> list[list[list[int]]]:
    """For each question the best passages of each router layer and of their mean."""
    found = {
        i: best_passages(scores, passages, LISTED)
        for i, scores in router_scores(model, renderer, bank, questions, mean_over_tokens=mean_over_tokens)
    }
    return [found[i] for i in range(len(questions))]


def add_router(case: Case, model, renderer, *, mean_over_tokens: bool) -> None:
    """Add the router's scores, of each layer and of their mean, and those of joined rankings, to the case's row."""
    name = "router, mean over tokens" if mean_over_tokens else "router"
    ranked = rank_router(model, renderer, case.bank, case.passages, case.questions, mean_over_tokens=mean_over_tokens)
    methods, layers = case.row["methods"], len(ranked[0]) - 1
    for layer in range(layers if layers > 1 else 0):
        own = [r[layer] for r in ranked]
        methods[f"{name}, layer {model.config.router_layers[layer]}"] = scores_of(case.wanted, lambda k: own)  # noqa: B023
    last = [r[-1] for r in ranked]
    both = list(zip(case.bm25, last, strict=True))
    fused = [fuse(pair) for pair in both]
    methods[name] = scores_of(case.wanted, lambda k: last)
    methods[f"bm25 + {name}, fused"] = scores_of(case.wanted, lambda k: fused)
    methods[f"bm25 + {name}, halves"] = scores_of(case.wanted, lambda k: [halves(*pair, k) for pair in both])


def _names(folders: Iterable[str | pathlib.Path]) -> str:
    """The folders without where they lie on this machine."""
    return ",".join(pathlib.Path(folder).name for folder in folders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, help="of a run of configs/wiki.py; default: BM25 alone")
    parser.add_argument("--folders", default="", help="parted by commas; default: those of the run")
    parser.add_argument("--eval_fraction", type=float, default=0.5, help="share of questions asked, without a run")
    parser.add_argument("--split", choices=("eval", "train"), default="eval", help="train: those that training asks")
    parser.add_argument("--distractors", type=int, help="passages taken of folders without questions; default: all")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/quality/questions.json"))
    parser.add_argument("--beside", default="", help="folders of documents, parted by commas, for a third, larger bank")
    parser.add_argument("--figure", type=pathlib.Path, help="picture to draw")
    parser.add_argument("--mean", action="store_true", help="score by the mean over routing tokens too")
    parser.add_argument("--untrained", action="store_true", help="ask the model that the run's training starts from")
    parser.add_argument("--seed", type=int, default=1, help="of document numbers")
    args = parser.parse_args()

    if not args.workdir and not args.folders:
        parser.error("give --workdir, or --folders for BM25 alone")
    if args.split == "train" and args.workdir and not args.untrained:
        parser.error("--split train asks what the model was trained on; add --untrained, or leave it out")
    command = "python -m benchmarks.quality.questions"
    command += f" --workdir {args.workdir.name}" if args.workdir else f" --eval_fraction {args.eval_fraction}"
    given, beside = (
        [pathlib.Path(f.strip()) for f in told.split(",") if f.strip()] for told in (args.folders, args.beside)
    )
    command += f" --folders {_names(given)}" * bool(given)
    command += f" --beside {_names(beside)}" * bool(beside)
    command += f" --split {args.split}" * (args.split != "eval")
    command += "" if args.distractors is None else f" --distractors {args.distractors}"
    command += " --mean" * args.mean + " --untrained" * args.untrained
    record = {"command": command, "commit": commit(), **environment()}
    record |= {"seed": args.seed, "bm25s": bm25s.__version__}

    if not args.workdir:
        source, more = read_passages(given, args.eval_fraction, args.distractors, beside)
        whole = np.arange(len(source.documents))
        rows = [case.row for case in make_cases(given, args.split, args.eval_fraction, None, whole, source, more)]
        write_json(args.out, record | {"folders": _names(given), "rows": rows})
        print(table(rows))
        return

    run = open_run(args.workdir)
    folders = given or run.data.settings.folders
    source, more = read_passages(folders, run.data.eval_fraction, args.distractors, beside)
    if args.untrained:
        tokenizer = open_tokenizer(run, args.workdir, train=False)
        model, renderer, steps = make_model(run, tokenizer), Renderer(tokenizer, run.data.document_len), 0
    else:
        model, renderer = load_model(run, args.workdir)
        with contextlib.closing(Checkpoints(args.workdir / "checkpoints")) as checkpoints:
            steps = checkpoints.latest_step
    blocks, passages = cut_passages(source, renderer, titles=run.data.settings.titles)
    begin = time.monotonic()
    bank = encode_documents(
        model, renderer, blocks, row_len=run.row_len(model.config.chunk_size), seed=args.seed
    )
    seconds = time.monotonic() - begin
    record |= {
        "steps": steps,
        "passages": len(source.documents),
        "blocks": len(blocks),
        "tokens": int(sum(map(len, renderer.tokenizer.encode_batch([text_of(d) for d in source.documents])))),
        "chunks": int(bank.layout.num_chunks),
        "encode_seconds": seconds,
        "folders": _names(folders),
        "config": run.to_dict() | {"data": run.to_dict()["data"] | {"folder": _names(run.data.settings.folders)}},
    }
    cases = list(make_cases(folders, args.split, run.data.eval_fraction, bank, passages, source, more))
    rows = [case.row for case in cases]
    for mean in (False, True)[: 1 + args.mean]:
        for case in cases:
            add_router(case, model, renderer, mean_over_tokens=mean)
            write_json(args.out, record | {"rows": rows})  # whole rows stay, should time run out
    print(table(rows))
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    try:
        main()
    except MSAError as error:
        raise SystemExit(f"questions: {error}") from None
