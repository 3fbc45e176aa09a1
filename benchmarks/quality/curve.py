"""Scores of one model on memories from 16K to 100M tokens, all beginnings of one that is encoded once.

    python -m benchmarks.quality.curve --workdir runs/curve --memory /tmp/curve.memory

Every document of the memory carries a needle, and three quarters of the keys share their words with many others. The
haystack is the documentation of all installed packages, and what --folders adds. Each size is asked with every --top_k.
Interrupted, the same command goes on: with encoding where it stopped, and with the first size that has no scores yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import resource
import time

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from benchmarks.measure import commit, environment, write_json
from msa_jax.data import JsonlSource, NeedleSource, PythonDocsSource, Renderer, frequent_words
from msa_jax.errors import ConfigError, DataError
from msa_jax.evaluation.evaluate import means, score
from msa_jax.evaluation.grown import GrownMemory, Part
from msa_jax.evaluation.plots import token_count
from msa_jax.inference.engine import Engine
from msa_jax.inference.library import FixedLibrary
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model, open_run, reconfigured
from msa_jax.runs.workdir import written_settings

SIZES = (16_384, 65_536, 262_144, 1_048_576, 4_194_304, 16_777_216, 64_000_000, 100_000_000)
# What the paper (arXiv 2603.23516) publishes of its 4B model: under 9 % lost from 16K to 100M tokens on MS MARCO, and
# the mean of RULER's eight needle tasks at 1M tokens.
_PAPER_KEPT, _PAPER_RULER = ((16_384, 1.0), (100_000_000, 0.91)), (1_048_576, 0.9484)
_SAMPLE = 2048
# Questions that large sizes are asked, the first of all: each is compared with every chunk, twice.
_MOST = {4_194_304: 256, 16_777_216: 128, 64_000_000: 64, 100_000_000: 128}


def source(run: RunConfig, renderer: Renderer, folders: list[str]) -> NeedleSource:
    """Needles under keys that training never asked for, of training's words, in as much text as there is."""
    data, tokenizer = run.data, renderer.tokenizer
    own = data.settings
    words = frequent_words(own.haystack(), tokenizer, own.num_words, own.key_format)
    texts = list(PythonDocsSource("train", packages=None).passages())
    texts += [d.text for folder in folders for d in JsonlSource(folder).documents]
    return NeedleSource(
        texts, words, tokenizer,
        document_tokens=data.document_len, split="eval", eval_fraction=data.eval_fraction, key_format=own.key_format,
        hard_fraction=own.hard_fraction, needle_fraction=own.needle_fraction,
    )  # fmt: skip


def margins(part: Part, asked: list[int], questions, answers) -> list[list[float]]:
    """By how much each router layer scores the right document above the best other one, [questions][L_r]."""
    found = []
    for number, answer in zip(asked, answers, strict=True):
        right = int(questions[number].supporting_ids[0])
        first = answer.rounds[0]
        hit = first.documents == right
        best = np.max(np.where(hit, -np.inf, first.scores), axis=1)
        # A right document that is not even among those reported is worse than the last of them.
        own = np.where(hit.any(axis=1), np.max(np.where(hit, first.scores, -np.inf), axis=1), first.scores[:, -1])
        found.append((own - best).tolist())
    return found


def ask(model, renderer, memory: GrownMemory, size: int, most: int) -> dict:
    """Scores of a size, over all parts that its questions need."""
    settings = EngineConfig(slots=16, prefill_rows=16, context=256, lengths=(48, 176), decode_steps=16)
    rows, gaps, seconds, held = [], [], 0.0, 0
    for part in memory.parts(size):
        asked = [i for i in part.asked if i < most]
        if not asked:
            continue
        engine = Engine(model, renderer, FixedLibrary(part.bank, part.originals), settings)
        budget = Budget(rounds=2, turn_tokens=24, answer_tokens=24)
        begin = time.monotonic()
        texts = [memory.questions[i].question for i in asked]
        answers = engine.ask(texts, config=AskConfig(budget=budget))
        answers = list(tqdm(answers, total=len(asked), desc=f"ask {size:,}", mininterval=5.0))
        seconds, held = seconds + time.monotonic() - begin, part.bank.nbytes
        rows += [row for _, row in score(memory, asked, answers)]
        gaps += margins(part, asked, memory.questions, answers)
        tokens, documents = part.tokens, len(part.originals)
        del engine, part, answers
        gc.collect()  # an engine is a ring of references, and there is no room for two banks of the largest size
    gaps = np.array(gaps)
    return {
        "memory_tokens": size, "tokens": tokens, "documents": documents, "questions": len(rows),
        **means(rows),
        "margin_mean": gaps.mean(axis=0).round(4).tolist(),
        "margin_5th_percentile": np.percentile(gaps, 5, axis=0).round(4).tolist(),
        "seconds_per_question": seconds / len(rows), "bank_mib": held / 2**20,
    }  # fmt: skip


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Exact match by size for every k, with what the paper says of its own model."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for top_k, style in zip(sorted({row["top_k"] for row in rows}), ("o-", "s--", "^:", "v-."), strict=False):
        own = sorted((row for row in rows if row["top_k"] == top_k), key=lambda row: row["memory_tokens"])
        scores = [row["exact_match"] for row in own]
        axes.plot([row["memory_tokens"] for row in own], scores, style, label=f"this model, k {top_k}: exact match")
    kept = "paper, MS MARCO: at least this share of 16K is kept"
    axes.plot(*zip(*_PAPER_KEPT, strict=True), ".:", color="grey", label=kept)
    axes.plot(*_PAPER_RULER, "*", color="grey", markersize=11, label="paper, RULER needles: mean at 1M")
    sizes = sorted({row["memory_tokens"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [token_count(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens of memory", ylim=(0.5, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=144)


def table(rows: list[dict]) -> str:
    """Markdown, one line a size and k."""
    head = (
        "memory", "k", "questions", "exact match", "ids", "recall@1", "recall@16", "margin, mean", "lowest 5 %",
        "s/question",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    layers = lambda values: " / ".join(f"{v:.3f}" for v in values)  # noqa: E731
    for row in sorted(rows, key=lambda row: (row["memory_tokens"], row["top_k"])):
        cells = (
            token_count(row["memory_tokens"]), row["top_k"], row["questions"], f"{row['exact_match']:.3f}",
            f"{row['id_exact_match']:.3f}", layers(row["router_recall@1"]), layers(row["router_recall@16"]),
            layers(row["margin_mean"]), layers(row["margin_5th_percentile"]), f"{row['seconds_per_question']:.2f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def encode(run: RunConfig, model, renderer: Renderer, options: argparse.Namespace, tokens: int) -> None:
    """Encode the memory, or what is missing of it."""
    needles = source(run, renderer, [f for f in options.folders.split(",") if f])
    digits = renderer.tokenizer.template.id_digits
    _, some = needles.memory(_SAMPLE, 0, np.random.default_rng(options.seed), id_digits=digits)
    length = np.mean([len(renderer.render_document(d, n)) for block in some for d, n in zip(*block, strict=True)])
    count = int(1.005 * tokens / length)
    questions, blocks = needles.memory(
        count, options.questions, np.random.default_rng(options.seed), id_digits=digits,
        needle_documents=min(count, int(0.98 * options.first / length)),
    )  # fmt: skip
    # In bfloat16, in which processors may be faster; questions are asked in the model's own dtype.
    memory = GrownMemory(options.memory, reconfigured(model, dtype="bfloat16"), renderer, documents=count)
    memory.fill(questions, blocks, rows_per_step=128)


def command(options: argparse.Namespace) -> str:
    """What was asked for, without the machine's paths."""
    names = ",".join(pathlib.Path(folder).name for folder in options.folders.split(",") if folder)
    words = [f"python -m benchmarks.quality.curve --workdir runs/{pathlib.Path(options.workdir).name} --memory FOLDER"]
    words += [f"--folders {names}"] * bool(names)
    kept = ("sizes", "top_k", "router_bias_scale", "questions", "first", "seed", "steps")
    return " ".join(words + [f"--{name} {getattr(options, name)}" for name in kept])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of the trained run")
    parser.add_argument("--memory", required=True, help="folder in which the encoded memory is kept, 70 bytes a token")
    parser.add_argument("--folders", default="", help="folders with a documents.jsonl, more haystack; commas between")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="tokens of memory")
    parser.add_argument("--top_k", default="1,16")
    parser.add_argument("--router_bias_scale", type=float, default=1.0, help="as the model's; default %(default)s")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--first", type=int, default=65_536, help="tokens in which all questions' documents lie")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", default="encode,ask", help="one alone: to ask sizes while others are being encoded")
    parser.add_argument("--out", type=pathlib.Path, help="default: curve.json in the workdir")
    parser.add_argument("--figure", type=pathlib.Path, help="default: memory_curve.png in the workdir")
    options = parser.parse_args()
    sizes = sorted(int(s) for s in options.sizes.split(","))
    workdir = pathlib.Path(options.workdir)
    run = open_run(workdir)
    model, renderer = load_model(run, workdir)
    ks = [int(k) for k in options.top_k.split(",")]
    try:
        asked = {k: reconfigured(model, top_k=k, router_bias_scale=options.router_bias_scale) for k in ks}
    except ConfigError as error:
        raise SystemExit(f"curve: {error}") from None
    folder = pathlib.Path(options.memory)
    steps = options.steps.split(",")
    if "encode" in steps:
        encode(run, model, renderer, options, sizes[-1])
    if "ask" not in steps:
        return
    memory = GrownMemory(folder, model, renderer)
    settings = {"seed": options.seed, "questions": options.questions, "trained": written_settings(workdir)}
    settings |= {"memory": {"first": options.first, "documents": len(memory.numbers)}}
    settings |= {"router_bias_scale": options.router_bias_scale}
    record = {"command": command(options), "commit": commit(), "settings": settings, "rows": []} | environment()
    out = options.out or workdir / "curve.json"
    if out.exists():
        there = json.loads(out.read_text())
        if {"router_bias_scale": 1.0} | there["settings"] != json.loads(json.dumps(settings)):
            of = "another model, memory, router bias or number of questions"
            raise DataError(f"{out} holds scores of {of}; give another --out")
        record["rows"] = there["rows"]
    done = {(row["memory_tokens"], row["top_k"]) for row in record["rows"]}
    for size in sizes:
        for top_k in ks:
            if (size, top_k) in done:
                continue
            most = min(options.questions, _MOST.get(size, options.questions))
            row = {"top_k": top_k} | ask(asked[top_k], renderer, memory, size, most)
            record |= {"encode_seconds": round(memory.seconds), "encoded_documents": memory.done}
            row["peak_resident_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            record["rows"].append(row)
            write_json(out, record)
            draw(record["rows"], options.figure or workdir / "memory_curve.png")
            print({name: row[name] for name in ("memory_tokens", "top_k", "exact_match", "id_exact_match")}, flush=True)
    print(table(record["rows"]))


if __name__ == "__main__":
    main()
