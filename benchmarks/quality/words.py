"""How much a bag of words finds at each width: what bounds the start of `msa_jax.training.bag_of_words`. No model runs.

    python -m benchmarks.quality.words --workdir runs/wiki --chunk_sizes 16,64 --widths 256,384,512,0

A chunk is the sum of its tokens' random vectors of some width times their rarity, a question likewise, and a passage
scores as its best chunk by the cosine; width 0 has a dimension for each token, so that nothing matches by chance.
Questions are those that training asks (`--split eval`: the others), so that a width can be chosen without looking at
those that are reported.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import scipy.sparse as sp

from benchmarks.measure import commit, environment, write_json
from benchmarks.quality.questions_cases import cut_passages, read_passages
from msa_jax.data import JsonlSource, Renderer
from msa_jax.data.batch import ROUTING
from msa_jax.evaluation.retrieval import recall
from msa_jax.runs.build import open_tokenizer
from msa_jax.runs.open import open_run
from msa_jax.training.bag_of_words import rarity

_AT = 16


def bags(rows: list[np.ndarray], weights: np.ndarray) -> sp.csr_matrix:
    """[len(rows), V]: how often each token is in a row, times its weight."""
    owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    tokens = np.concatenate(rows)
    return sp.csr_matrix((weights[tokens], (owners, tokens)), (len(rows), len(weights)))


def directions(bag: sp.csr_matrix, vectors: np.ndarray | None):
    """Rows of norm 1, of the width of `vectors` [V, D], or of one dimension a token; empty rows stay 0."""
    made = bag if vectors is None else bag @ vectors
    squares = made.multiply(made) if vectors is None else made * made
    norms = np.sqrt(np.asarray(squares.sum(1), np.float32)).ravel()
    scale = 1 / np.where(norms > 0, norms, 1.0)
    return sp.diags(scale) @ made if vectors is None else made * scale[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of a run of configs/wiki.py")
    parser.add_argument("--chunk_sizes", type=numbers, default=[16, 64])
    parser.add_argument("--widths", type=numbers, default=[256, 384, 512, 0])
    parser.add_argument("--split", choices=("train", "eval"), default="train")
    parser.add_argument("--seed", type=int, default=0, help="of the random vectors")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/quality/words.json"))
    args = parser.parse_args()
    run = open_run(args.workdir)
    tokenizer = open_tokenizer(run, args.workdir, train=False)
    renderer = Renderer(tokenizer, run.data.document_len)
    folders = [pathlib.Path(folder) for folder in run.data.folders]
    source, _ = read_passages(folders, run.data.eval_fraction, None, [])
    blocks, owner = cut_passages(source, renderer, titles=run.data.titles)
    place = {document.id: i for i, document in enumerate(source.documents)}
    weights = rarity(tokenizer, [d.text for d in blocks], tokenizer.vocab_size)
    rendered = [np.asarray(renderer.render_document(d, 0)) for d in blocks]
    sets = {
        folder.name: JsonlSource(folder, args.split, run.data.eval_fraction)
        for folder in folders
        if (folder / "questions.jsonl").is_file()
    }
    record = {
        "command": f"python -m benchmarks.quality.words --workdir {args.workdir.name} --chunk_sizes "
        f"{','.join(map(str, args.chunk_sizes))} --widths {','.join(map(str, args.widths))} --split {args.split}",
        "seed": args.seed, "commit": commit(), **environment(), "rows": [],
    }  # fmt: skip
    for size in args.chunk_sizes:
        cut = [ids[i : i + size] for ids in rendered for i in range(0, len(ids), size)]
        passages = np.repeat(owner, [-(-len(ids) // size) for ids in rendered])
        chunks = bags(cut, weights)
        for width in args.widths:
            rng = np.random.default_rng(args.seed)
            vectors = rng.standard_normal((len(weights), width), np.float32) if width else None
            keys = directions(chunks, vectors)
            row = {"chunk_size": size, "width": width or None, f"recall@{_AT}": {}}
            for name, asked in sets.items():
                prompts = [renderer.prompt(question.question) for question in asked.questions]
                words = [np.asarray([i for i, r in zip(*p, strict=True) if r == ROUTING]) for p in prompts]
                scores = directions(bags(words, weights), vectors) @ keys.T
                scores = np.asarray(scores if vectors is not None else scores.todense(), np.float32)
                wanted = [{place[i] for i in question.supporting_ids} for question in asked.questions]
                best = np.maximum.reduceat(scores, np.flatnonzero(np.diff(passages, prepend=-1)), axis=1)
                row[f"recall@{_AT}"][name] = {}
                own = np.isin(np.arange(len(place)), [place[d.id] for d in asked.documents])
                for bank, some in (("own", own), ("all", True)):
                    ranked = np.argsort(np.where(some, -best, np.inf), kind="stable")[:, :_AT]
                    shares = [recall(one, found, _AT) for one, found in zip(ranked.tolist(), wanted, strict=True)]
                    row[f"recall@{_AT}"][name][bank] = float(np.mean(shares))
            record["rows"].append(row)
            print(row, flush=True)
            write_json(args.out, record)


if __name__ == "__main__":
    main()
