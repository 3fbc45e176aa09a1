"""Hard negatives mined by a trained router: which wrong documents it ranks first for questions of training.

    python -m msa_jax.evaluation.mine --workdir runs/wiki --out runs/negatives.jsonl --export runs/wiki_export

A run with `data.hard_negatives` set to the file then has them in its batches. With `--export` the run's parameters and
tokenizer are saved beside it in the published layout, for `init_from` and `tokenizer.path` of a run that goes on.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
from tqdm import tqdm

from msa_jax.cli.base import run as run_command
from msa_jax.data import CorpusSource, Renderer
from msa_jax.data.corpora.negatives import write_negatives
from msa_jax.errors import ConfigError
from msa_jax.evaluation.retrieval import encode_documents, router_scores
from msa_jax.export import export, require_new
from msa_jax.model import MSATransformer
from msa_jax.runs.build import make_source
from msa_jax.runs.open import load_model, open_run


def mine(
    model: MSATransformer,
    renderer: Renderer,
    source: CorpusSource,
    *,
    row_len: int,
    most: int,
    count: int,
    seed: int = 0,
) -> dict[str, list[str]]:
    """Ids of the `count` best wrong documents, best first, by question id.

    Blocks of one passage (`id/1`, `id/2`, ...) are never wrong for each other. Asked are the questions with answers,
    then others at random, `most` together. Ranked by the mean score over router layers, as router mode ranks.
    """
    unique = list({question.id: question for question in source.questions}.values())
    order = np.random.default_rng(seed).permutation(len(unique))
    asked = sorted((unique[i] for i in order), key=lambda question: not question.answers)[:most]
    ids = [document.id for document in source.documents]
    family = np.array([_passage(name) for name in ids])
    bank = encode_documents(model, renderer, source.documents, row_len=row_len, seed=seed)
    found: dict[str, list[str]] = {}
    scored = router_scores(model, renderer, bank, [question.question for question in asked])
    for i, scores in tqdm(scored, desc="mine", total=len(asked), unit="question", mininterval=5.0):
        mean = scores.mean(0)
        right = np.isin(family, [_passage(name) for name in asked[i].supporting_ids])
        mean[right] = -np.inf
        best = np.argpartition(-mean, min(count, len(mean) - 1))[:count]
        best = best[np.argsort(-mean[best], kind="stable")]
        found[asked[i].id] = [ids[j] for j in best if not right[j]]
    return found


def _passage(name: str) -> str:
    """What a document is a block of: itself unless its id ends in the number of a block."""
    head, _, number = name.rpartition("/")
    return head if head and number.isdecimal() else name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="of the trained run")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="file to write")
    parser.add_argument("--export", type=pathlib.Path, help="folder for parameters and tokenizer; must not exist")
    parser.add_argument("--most", type=int, default=4000, help="questions to mine for (default 4000)")
    parser.add_argument("--count", type=int, default=8, help="negatives a question (default 8)")
    args = parser.parse_args()
    return run_command("mine", lambda: _mine(args))


def _mine(args: argparse.Namespace) -> None:
    run = open_run(args.workdir)
    if not run.data.settings.lasting_documents:
        raise ConfigError(f"documents of data.source {run.data.source!r} are new in every batch: nothing can be mined.")
    if args.export:
        require_new(args.export)
    model, renderer = load_model(run, args.workdir)
    source = make_source(run.data, renderer.tokenizer, "train")
    row_len = run.row_len(model.config.chunk_size)
    found = mine(model, renderer, source, row_len=row_len, most=args.most, count=args.count)
    write_negatives(args.out, found)
    print(f"{len(found):,} questions, {sum(map(len, found.values())):,} negatives: {args.out}")
    if args.export:
        export(model, renderer.tokenizer, args.export)


if __name__ == "__main__":
    sys.exit(main())
