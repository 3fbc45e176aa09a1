"""How the cost of a training step and of a question grows with the memory: counted by the compiler, and measured.

    python -m benchmarks.linear_cost [counted|measured|plot]... [--out benchmarks/results/linear_cost.json]

Counted: FLOPs and bytes accessed of the 4B model, by XLA's cost analysis of programs compiled for the CPU, of shapes
alone. The analysis counts the body of a loop once, however often it runs. So two models are counted, of one and of two
pairs of layers (one without router, one with): their difference is a pair's, and all 18 pairs make `first + 17 *
difference`. Routing takes one tile. Nothing is recomputed (recomputing layers would add one forward pass). The loss,
which does not depend on the memory, counts one of its blocks of the vocabulary. The CPU's compiler widens bfloat16, so
bytes are several times those of a chip; how they grow is what counts.
Measured: the tiny model with chunks of 64 tokens, on this machine's CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.measure import write_json
from msa_jax.config import MSAConfig
from msa_jax.context import Route
from msa_jax.data.batch import Batch, DocumentBatch, QuestionBatch
from msa_jax.evaluation.plots import token_count
from msa_jax.memory import DocumentLayout, MemoryBank
from msa_jax.model import MSATransformer
from msa_jax.plan import programs
from msa_jax.plan.settings import Bank, Sizes
from msa_jax.sharding import MeshConfig
from msa_jax.training import step
from msa_jax.training.config import Phase, TrainingConfig
from msa_jax.training.optimizer import make_optimizer
from msa_jax.training.schedule import phase_values
from pallas_kernels.chunk_scores import reference

TRAIN = (4_096, 16_384, 65_536, 1_048_576)
QUESTION = (16_384, 131_072, 1_048_576, 10_000_000, 100_000_000)
TRAIN_MEASURED, QUESTION_MEASURED = (4_096, 8_192, 16_384, 32_768, 65_536), QUESTION
PAIRS = 18
PLOT = pathlib.Path("docs/images/linear_cost.png")


def _mesh():
    return MeshConfig(data=1).make(jax.devices()[:1])


def counted(make: Callable[[MSAConfig], programs.Program]) -> dict[str, float]:
    """FLOPs and bytes of the 4B model's program, from those of two models of few layers."""
    few = []
    for pairs in (1, 2):
        config = MSAConfig.preset("qwen3_4b", num_layers=2 * pairs, router_layers=tuple(range(1, 2 * pairs, 2)))
        few.append(make(config).lower().compile().cost_analysis())
    one, two = ({name: c[name] for name in ("flops", "bytes accessed")} for c in few)
    return {name.split()[0]: one[name] + (PAIRS - 1) * (two[name] - one[name]) for name in one}


def count_training(tokens: int) -> dict[str, float]:
    """The training step of the 4B model, 8 questions of 128 tokens, documents of 1,024 tokens."""
    sizes = Sizes(train_tokens=tokens, train_batch=8)
    return counted(lambda config: programs.train(config, _mesh(), sizes, MeshConfig(data=1), remat="none"))


def count_question(tokens: int) -> dict[str, float]:
    """The question step of the 4B model, one question of 64 tokens, documents of 1,024 tokens."""
    sizes = Sizes(tokens=tokens, batch=1, longest_tokens=1024)
    return counted(lambda config: programs.question(config, _mesh(), Bank(), sizes))


@contextlib.contextmanager
def one_tile():
    """Within it routing takes one tile, whatever the size."""
    before, reference._TILE_ELEMENTS = reference._TILE_ELEMENTS, 1 << 62
    try:
        yield
    finally:
        reference._TILE_ELEMENTS = before


def _median_of(call: Callable[[], object], least: int = 3, seconds: float = 2.0) -> float:
    jax.block_until_ready(call())
    times = []
    while len(times) < least or sum(times) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _tiny() -> tuple[MSATransformer, MSAConfig]:
    config = MSAConfig.preset("tiny", chunk_size=64)
    return MSATransformer(config, rngs=nnx.Rngs(0)), config


def time_training(tokens: int) -> float:
    """Seconds of the tiny model's training step: documents of 256 tokens, 8 questions of 64."""
    model, config = _tiny()
    rng, n, width, per = np.random.default_rng(0), tokens // 256, 256, 256 // config.chunk_size
    ints = lambda *shape: rng.integers(1, config.vocab_size, size=shape, dtype=np.int32)  # noqa: E731
    documents = DocumentBatch(
        tokens=ints(n, width), segment_ids=np.ones((n, width), np.int32),
        positions=np.tile(np.arange(width, dtype=np.int32), (n, 1)),
        chunk_documents=np.repeat(np.arange(n, dtype=np.int32), per), starts=np.arange(n, dtype=np.int32) * per,
        lengths=np.full(n, per, np.int32),
    )  # fmt: skip
    questions = QuestionBatch(
        tokens=ints(8, 64), roles=np.zeros((8, 64), np.int32), mask=np.ones((8, 64), bool),
        loss_weights=np.ones((8, 64), np.float32), visible=np.ones((8, n), bool), relevant=rng.random((8, n)) < 2 / n,
    )  # fmt: skip
    training = TrainingConfig(phases=(Phase(steps=1000),))
    graphdef, params = nnx.split(model)
    optimizer = make_optimizer(training)
    state = step.init_state(nnx.as_pure(params), optimizer, training)
    train_step = step.make_step(graphdef, optimizer, training, (1, 2, 3))
    batch, phase = jax.device_put(Batch(documents, questions)), phase_values(training.phases[0])

    def once():
        nonlocal state
        state, metrics = train_step(state, batch, phase)
        return metrics

    return _median_of(once)


def time_question(tokens: int) -> float:
    """Seconds of the tiny model's question step: one question of 64 tokens, documents of 1,024."""
    model, config = _tiny()
    rng, per = np.random.default_rng(0), 1024 // config.chunk_size
    documents = -(-tokens // 1024)
    chunks, layers = documents * per, len(config.router_layers)
    # Of a block of random vectors again and again: what they hold does not change the work.
    block = rng.normal(size=(layers, min(chunks, 16_384), config.router_width)).astype(np.float32)
    vectors = np.concatenate([block] * -(-chunks // block.shape[1]), axis=1)[:, :chunks]
    content = jnp.asarray(vectors.reshape(layers, chunks, config.num_kv_heads, config.head_dim))
    owners = np.repeat(np.arange(documents, dtype=np.int32), per)
    starts = np.arange(documents, dtype=np.int32) * per
    layout = DocumentLayout(*map(jnp.asarray, (owners, starts, np.full(documents, per, np.int32))), max_length=per)
    bank = MemoryBank(jnp.asarray(vectors), content, content, layout)
    graphdef, params = nnx.split(model)

    @jax.jit
    def ask(params, tokens, bank):
        output = nnx.merge(graphdef, params).prefill(tokens, read=Route(bank))
        return output.hidden, output.own, output.selection

    question = jnp.asarray(rng.integers(1, config.vocab_size, size=(1, 64)), jnp.int32)
    return _median_of(lambda: ask(params, question, bank))


CURVES = {
    "counted: training step, 4B": (count_training, TRAIN),
    "counted: question step, 4B": (count_question, QUESTION),
    "measured: training step, tiny": (time_training, TRAIN_MEASURED),
    "measured: question step, tiny": (time_question, QUESTION_MEASURED),
}


def exponents(sizes: list[int], values: list[float]) -> dict[str, float]:
    """Slopes of log value over log size: of the line through all, between neighbours at most, and at the end."""
    x, y = np.log(sizes), np.log(values)
    steps = np.diff(y) / np.diff(x)
    return dict(overall=float(np.polyfit(x, y, 1)[0]), steepest=float(steps.max()), last=float(steps[-1]))


def plot(curves: dict[str, dict], path: pathlib.Path) -> None:
    """Each curve relative to its first point, and the line of exponent 1."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("training", "question"), strict=True):
        for name, curve in curves.items():
            if what not in name:
                continue
            sizes = curve["tokens"]
            for unit, values in curve["values"].items():
                axes.plot(sizes, np.array(values) / values[0], "o-", label=f"{name}, {unit}", alpha=0.8)
        ends = np.array(axes.get_xlim())
        first, last = max(ends[0], min(sizes)), max(max(c["tokens"]) for n, c in curves.items() if what in n)
        axes.plot([first, last], [1, last / first], "k:", label="linear")
        axes.set(xscale="log", yscale="log", xlabel="tokens of memory", ylabel="cost, relative to the smallest memory")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: token_count(round(x))))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    with matplotlib.rc_context({"savefig.dpi": 144}):
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["counted", "measured", "plot"], help="default all three")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/linear_cost.json"))
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else dict(curves={})
    results["versions"] = {"jax": importlib.metadata.version("jax")}
    for name, (cost, sizes) in CURVES.items():
        kind = name.partition(":")[0]
        if kind not in options.what:
            continue
        with one_tile() if kind == "counted" else contextlib.nullcontext():
            values = []
            for tokens in sizes:
                found = cost(tokens)
                values.append(found if isinstance(found, dict) else dict(seconds=found))
                print(f"{name:32}{token_count(tokens):>7}", values[-1], flush=True)
        by_unit = {unit: [v[unit] for v in values] for unit in values[0]}
        slopes = {unit: exponents(list(sizes), v) for unit, v in by_unit.items()}
        results["curves"][name] = dict(tokens=list(sizes), values=by_unit, exponents=slopes)
        write_json(options.out, results)
    for name, curve in results["curves"].items():
        for unit, slopes in curve["exponents"].items():
            print(f"{name:32}{unit:10}" + ", ".join(f"{k} {v:.3f}" for k, v in slopes.items()))
    if "plot" in options.what:
        plot(results["curves"], PLOT)


if __name__ == "__main__":
    main()
