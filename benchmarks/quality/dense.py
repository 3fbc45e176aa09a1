"""The baseline of dense attention: the same transformer reads all documents as tokens of its own context.

    python -m benchmarks.quality.dense --workdir runs/dense --documents 16 --memory_tokens 1024,2048,4096

Training: the data, samples, start, optimiser and steps of `configs/small.py`; the documents of a batch, one after the
other, are the past of all its questions, every layer attends to all of it, and there is no bank, no router and no
auxiliary loss. Asking: by the engine, free-running, with the documents as its prefix; a document that the model names
is quoted as ever. Sizes: B questions, T active tokens, S tokens of all documents, U targets a question.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import pathlib
import shlex
import sys
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.measure import commit
from benchmarks.quality.asked import Results, memory_of
from benchmarks.quality.variants import CONFIG, load_config, make_run
from benchmarks.quality.ways import Way, answers, scores
from msa_jax.checkpoints.run import Checkpoints
from msa_jax.cli.compilation import add_flag, keep_programs
from msa_jax.data import Renderer, make_dataset
from msa_jax.data.batch import Batch
from msa_jax.evaluation.memories import Memory
from msa_jax.model import MSATransformer
from msa_jax.runs.build import make_model, make_source, open_tokenizer
from msa_jax.runs.config import RunConfig
from msa_jax.runs.open import load_model, reconfigured
from msa_jax.runs.workdir import check_workdir
from msa_jax.training.log import RunLog
from msa_jax.training.losses import lm_loss
from msa_jax.training.optimizer import make_optimizer
from msa_jax.training.step import init_state

OUT = pathlib.Path("benchmarks/results/quality/baselines.json")


def dense_loss(model: MSATransformer, batch: Batch, prefix: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """LM loss of the questions with all documents in context, and the share of targets that are the likeliest token."""
    docs, asked = batch.documents, batch.questions
    head = jnp.asarray(prefix, jnp.int32)
    tokens = jnp.concatenate([head, docs.tokens.reshape(-1)])[None]
    there = jnp.concatenate([jnp.ones(len(prefix), bool), docs.segment_ids.reshape(-1) > 0])[None]
    places = jnp.maximum(jnp.cumsum(there, axis=1, dtype=jnp.int32) - 1, 0)
    past = model(tokens, positions=places, mask=there).own
    own = jnp.maximum(jnp.cumsum(asked.mask, axis=1, dtype=jnp.int32) - 1, 0)
    b = asked.tokens.shape[0]
    hidden = model(
        asked.tokens,
        positions=jnp.sum(there, dtype=jnp.int32) + own,
        mask=jnp.concatenate([jnp.broadcast_to(there, (b, there.shape[1])), asked.mask], axis=1),
        past=past,
    ).hidden
    targets, weights = asked.tokens[:, 1:], asked.loss_weights[:, 1:]
    total, weight = lm_loss(hidden[:, :-1], model.output_embedding, targets, weights)
    right = (jnp.argmax(model.logits(hidden[:, :-1]), axis=-1) == targets) & (weights >= 1)
    return total / jnp.maximum(weight, 1e-6), jnp.sum(right) / jnp.maximum(jnp.sum(weights >= 1), 1)


def train_dense(run: RunConfig, workdir: pathlib.Path, *, seconds: float = float("inf")) -> int:
    """Train, or go on with, the dense model in `workdir` for about so long; returns the steps done so far."""
    begin = time.monotonic()
    check_workdir(run, workdir)
    tokenizer = open_tokenizer(run, workdir, train=True)
    model = make_model(run, tokenizer)
    dataset = make_dataset(
        make_source(run.data, tokenizer, "train"), tokenizer,
        num_documents=run.data.num_documents, num_questions=run.data.num_questions,
        chunk_size=model.config.chunk_size, row_len=run.row_len(model.config.chunk_size),
        document_len=run.data.document_len, question_len=run.data.question_len,
        loss_weights=run.data.loss_weights, seed=run.training.seed,
    )  # fmt: skip
    batches, training, prefix = iter(dataset), run.training, tuple(Renderer(tokenizer).prefix)
    graphdef, params = nnx.split(model)
    optimizer = make_optimizer(training)
    state = init_state(nnx.as_pure(params), optimizer, training)

    @jax.jit
    def train_step(state, batch):
        loss_of = lambda params: dense_loss(nnx.merge(graphdef, params), batch, prefix)  # noqa: E731
        (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), loss, right

    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=2)) as checkpoints:
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state, batches)
        step = int(state.step)
        with contextlib.closing(RunLog(workdir, resumed_step=step)) as log:
            while step < training.steps and time.monotonic() - begin < seconds:
                state, loss, right = train_step(state, next(batches))
                step += 1
                if step % training.log_every == 0:
                    log.write(step, {"lm_loss": float(loss), "right": float(right)})
                    print(f"step {step}: LM loss {float(loss):.3f}, targets right {float(right):.3f}", flush=True)
                if step % training.checkpoint_every == 0:
                    checkpoints.save(step, state, batches)
        checkpoints.save(step, state, batches)
        checkpoints.wait()
    return step


def ask_dense(model: MSATransformer, renderer: Renderer, memory: Memory, *, slots: int = 8):
    """Free-running answers with all documents of the memory in the context, in the order of the memory."""
    whole = copy.copy(renderer)
    documents = [renderer.render_document(memory.originals[n], n) for n in memory.numbers]
    whole.prefix = renderer.prefix + [token for one in documents for token in one]
    # The question's positions follow the documents', as in training.
    model = reconfigured(model, position_offset=len(whole.prefix))
    return answers(model, whole, None, memory, Way(bank="none"), slots=slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--config", type=pathlib.Path, default=CONFIG)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the second phase, if not those of the config")
    parser.add_argument("--documents", type=int, help="of a batch, and as many questions at most, if not the config's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop training after so long, and save")
    parser.add_argument("--memory_tokens", default="2048,4096,8192")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--only_train", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    add_flag(parser)
    options = parser.parse_args()
    keep_programs(options.compiled)
    config = load_config(options.config)
    changes = {"training.phases[1].steps": options.steps} if options.steps else {}
    if options.documents:
        fewer = min(options.documents, config.data.num_questions)
        changes |= {"data.num_documents": options.documents, "data.num_questions": fewer}
    run = make_run(config, changes, options.seed)
    step = train_dense(run, options.workdir, seconds=options.seconds)
    if step < run.training.steps or options.only_train:
        return
    results = Results(options.out, shlex.join(["python", "-m", "benchmarks.quality.dense", *sys.argv[1:]]))
    name = options.workdir.name
    results.run(name).update(dense=True, seed=options.seed, steps=step, trained_at=run.data.num_documents)
    model, renderer = load_model(run, options.workdir)
    for size in map(int, options.memory_tokens.split(",")):
        if not results.missing(name, [(size, "dense", 0)]):
            continue
        memory = memory_of(run, renderer, memory_tokens=size, num_questions=options.questions)
        begin = time.monotonic()
        told = ask_dense(model, renderer, memory)
        row = {
            "memory_tokens": size, "way": "dense", "step": 0, "tokens": memory.tokens,
            "documents": len(memory.numbers), "questions": len(memory.questions), **scores(memory, told),
            "seconds": round(time.monotonic() - begin, 1), "commit": commit(),
        }  # fmt: skip
        results.run(name)["rows"].append(row)
        results.write()
        print(json.dumps({n: row[n] for n in ("memory_tokens", "exact_match", "id_exact_match")}), flush=True)


if __name__ == "__main__":
    main()
