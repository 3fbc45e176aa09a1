"""The baseline of dense attention computes what one pass over all documents and one question would."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.quality import dense
from benchmarks.quality.asked import memory_of
from msa_jax.data import Renderer, make_dataset
from msa_jax.runs.build import make_model, make_source, open_tokenizer
from msa_jax.runs.config import RunConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def run(settings):
    settings["training"] |= {"phases": [{"steps": 4}], "checkpoint_every": 2, "log_every": 2}
    settings["data"] |= {"num_documents": 6, "num_questions": 3, "document_len": 77}
    return RunConfig.from_dict(settings)


@jax.jit
def _logits(model, tokens):
    return model.logits(model(tokens[None], positions=jnp.arange(len(tokens))[None]).hidden[0])


def whole_pass(model, tokens):
    """Logits of one sequence from position 0, nothing cached; causal, so what pads it to one shape changes nothing."""
    return np.asarray(_logits(model, jnp.asarray(tokens + [0] * (768 - len(tokens)))))[: len(tokens)]


def perturbed(model):
    """Far from the start, at which much is zero."""
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), state))


def test_the_loss_is_that_of_one_pass_over_everything(run, tmp_path):
    tokenizer = open_tokenizer(run, tmp_path, train=True)
    model = perturbed(make_model(run, tokenizer))
    data = run.data
    batch = next(iter(make_dataset(
        make_source(data, tokenizer, "train"), tokenizer, num_documents=6, num_questions=3, chunk_size=16,
        row_len=run.row_len(16), question_len=data.question_len, seed=1,
    )))  # fmt: skip
    docs, asked = batch.documents, batch.questions
    prefix = Renderer(tokenizer).prefix
    assert prefix and not (docs.segment_ids > 0).all()
    context = prefix + docs.tokens[docs.segment_ids > 0].tolist()
    total = weight = right = count = 0.0
    for tokens, mask, weights in zip(asked.tokens, asked.mask, asked.loss_weights, strict=True):
        own = tokens[mask].tolist()
        logits = whole_pass(model, context + own)[len(context) :]
        losses = -jax.nn.log_softmax(logits[:-1])[np.arange(len(own) - 1), own[1:]]
        w = weights[mask][1:]
        total, weight = total + float(losses @ w), weight + w.sum()
        right += float(((logits[:-1].argmax(-1) == np.array(own[1:])) & (w >= 1)).sum())
        count += (w >= 1).sum()
    loss, share = jax.jit(dense.dense_loss, static_argnums=2)(model, batch, tuple(prefix))
    np.testing.assert_allclose(loss, total / weight, rtol=2e-5)
    np.testing.assert_allclose(share, right / count, rtol=1e-6)


def test_training_goes_on_and_asking_reads_every_document(run, tmp_path):
    assert dense.train_dense(run, tmp_path, seconds=0) == 0
    assert dense.train_dense(run, tmp_path) == 4
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert dense.train_dense(run, tmp_path) == 4  # it is done
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2

    tokenizer = open_tokenizer(run, tmp_path, train=False)
    model, renderer = perturbed(make_model(run, tokenizer)), Renderer(tokenizer, run.data.document_len)
    memory = memory_of(run, renderer, memory_tokens=400, num_questions=2)
    context = renderer.prefix + [t for n in memory.numbers for t in renderer.render_document(memory.originals[n], n)]
    for question, answer in zip(memory.questions, dense.ask_dense(model, renderer, memory, slots=1), strict=True):
        tokens = context + renderer.prompt(question.question)[0]
        written = []
        for _ in range(3):
            written.append(int(whole_pass(model, tokens + written)[-1].argmax()))
        assert answer.rounds[0].written.startswith(tokenizer.decode(written))
