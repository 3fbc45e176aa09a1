"""Ablations of MSA on one small task: trains each variant with each seed, asks it, and records what it reached.

    python -m benchmarks.quality.ablations --variants "base,no aux loss" --seeds 0,1,2 --runs runs/ablations

Variants are those of `benchmarks/quality/variants.py`, on top of `configs/small.py`. What is trained and asked
already is left as it is: the same command goes on after any interruption. `--report` only prints the table and draws
the figure from the JSON file.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import sys

from benchmarks.quality import ablation_report
from benchmarks.quality.asked import Key, Results, ask_run
from benchmarks.quality.variants import CONFIG, find, load_config, make_run, slug
from msa_jax.cli.compilation import add_flag, keep_programs
from msa_jax.errors import ConfigError
from msa_jax.runs.build import train_run

OUT = pathlib.Path("benchmarks/results/quality/ablations.json")
THRESHOLDS = (("recall@1", 0.95), ("lm_loss", 1.0), ("lm_loss", 0.1))


def learned(metrics: str) -> dict[str, int | None]:
    """First logged step at which a figure of training passed a threshold and the next logged one did too."""
    lines = [json.loads(line) for line in metrics.splitlines()]
    found = {}
    for name, limit in THRESHOLDS:
        passed = [line[name] >= limit if name.startswith("recall") else line[name] <= limit for line in lines]
        steps = [lines[i]["step"] for i in range(len(lines)) if passed[i] and all(passed[i : i + 2])]
        found[f"{name} {limit}"] = steps[0] if steps else None
    return found


def wanted_of(sizes: list[int], ways: list[str], steps: list[int]) -> list[Key]:
    """All combinations, by size."""
    return [(size, way, step) for size in sizes for step in steps for way in ways]


def run_variant(results: Results, name: str, seed: int, options: argparse.Namespace) -> bool:
    """Train a variant to its end and ask it; False if a signal asked to stop."""
    run = make_run(load_config(options.config), options.changes | find(name), seed)
    workdir = options.runs / slug(name, seed)
    result = train_run(run, workdir)
    if not result.finished:
        return False
    record = results.run(slug(name, seed))
    record |= {
        "variant": name, "seed": seed, "changes": find(name), "steps": run.training.steps,
        "learned": learned((workdir / "metrics.jsonl").read_text()),
    }  # fmt: skip
    # The way that a model was trained for, where it cannot be asked in others.
    ways = ["latent"] if run.data.samples == "latent" else options.ways
    wanted = wanted_of(options.memory_tokens, ways, options.steps)
    ask_run(results, slug(name, seed), run, workdir, wanted, options.questions)
    results.write()
    return True


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [name.strip() for name in text.split(",")]  # noqa: E731
    numbers = lambda text: [int(n.replace("_", "")) for n in text.split(",")]  # noqa: E731
    made.add_argument("--variants", type=names, default=["base"])
    made.add_argument("--seeds", type=numbers, default=[0])
    made.add_argument("--memory_tokens", type=numbers, default=[1 << 14, 1 << 18])
    ways = ["generate", "constrained", "router"]
    made.add_argument("--ways", type=names, default=ways, help="of benchmarks/quality/ways.py")
    made.add_argument("--steps", type=numbers, default=[0], help="checkpoints that are asked; 0 is the last")
    made.add_argument("--questions", type=int, default=64)
    made.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/ablations"))
    made.add_argument("--out", type=pathlib.Path, default=OUT)
    made.add_argument("--config", type=pathlib.Path, default=CONFIG)
    made.add_argument("--report", action="store_true")
    made.add_argument("--figure", type=pathlib.Path, default=pathlib.Path("docs/images/ablations.png"))
    add_flag(made)
    made.set_defaults(changes={})
    return made


def main() -> None:
    options = parser().parse_args()
    if options.report:
        record = json.loads(options.out.read_text())
        print(ablation_report.table(record["runs"].values()))
        ablation_report.figure(record["runs"].values(), options.figure)
        return
    keep_programs(options.compiled)
    results = Results(options.out, shlex.join(["python", "-m", "benchmarks.quality.ablations", *sys.argv[1:]]))
    try:
        for name in options.variants:
            find(name)
        for name in options.variants:
            for seed in options.seeds:
                if not run_variant(results, name, seed, options):
                    return
    except ConfigError as error:
        raise SystemExit(f"ablations: {error}") from None


if __name__ == "__main__":
    main()
