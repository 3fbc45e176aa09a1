"""Documents of recent batches: the same as if they had been encoded with the batch, hidden where they would lie."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.data.batch import Batch, Sample, pack_documents, pack_questions
from msa_jax.errors import ConfigError
from msa_jax.training.config import OptimizerConfig, Phase, TrainingConfig
from msa_jax.training.loop import check_limits
from msa_jax.training.optimizer import make_optimizer
from msa_jax.training.recent import no_recent, remember, with_recent
from msa_jax.training.schedule import phase_values
from msa_jax.training.step import ask, empty_recent, encode, init_state, make_step

P, W, N, B, Q = 4, 12, 3, 2, 2
CONFIG = MSAConfig(
    vocab_size=31, hidden_size=24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=20,
    router_layers=(1, 2), chunk_size=P, top_k_documents=4, router_bias=True,
)  # fmt: skip


def tokens_of(seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 31, size) for size in (5, 11, 3)]


def batch_of(seed, identities):
    documents = pack_documents(tokens_of(seed), chunk_size=P, row_len=W, num_rows=3)
    rng = np.random.default_rng([seed, 1])
    samples = [Sample(rng.integers(1, 31, 7).tolist(), [0] * 4 + [-1] * 3, [0.0] * 4 + [1.0] * 3) for _ in range(B)]
    relevant = np.eye(B, N, dtype=bool)
    asked = pack_questions(samples, question_len=7, visible=np.ones((B, N), bool), relevant=relevant)
    return Batch(documents, asked, np.asarray(identities, np.int32))


BATCHES = [batch_of(0, (1, 2, 3)), batch_of(1, (4, 5, 6)), batch_of(2, (7, 5, 8))]


def model_of():
    return MSATransformer(CONFIG, rngs=nnx.Rngs(0))


def ring(model, batches, kept=Q):
    recent = no_recent(encode(model, batches[0].documents), kept)
    for batch in batches:
        recent = remember(recent, encode(model, batch.documents), batch)
    return recent


def scores(model, bank, asked):
    return np.asarray(ask(model, bank, asked, (5, 6)).document_scores)


def test_scores_and_answers_are_those_of_one_encoding_of_all_documents():
    model = model_of()
    now = BATCHES[2]
    bank, asked = with_recent(encode(model, now.documents), now, ring(model, BATCHES[:2]), np.int32(2))
    got = ask(model, bank, asked, (5, 6))
    everything = tokens_of(2) + tokens_of(0) + tokens_of(1)
    together = pack_documents(everything, chunk_size=P, row_len=W)
    visible = np.ones((B, 3 * N), bool)
    visible[:, 2 * N + 1] = False  # the fifth identity is in this batch too
    np.testing.assert_array_equal(asked.visible, visible)
    np.testing.assert_array_equal(asked.relevant, np.eye(B, 3 * N, dtype=bool))
    plain = dataclasses.replace(now.questions, visible=visible, relevant=np.asarray(asked.relevant))
    want = ask(model, encode(model, together), plain, (5, 6))
    np.testing.assert_allclose(got.document_scores, want.document_scores, atol=2e-6)
    np.testing.assert_allclose(got.hidden, want.hidden, atol=2e-5)
    np.testing.assert_array_equal(got.selection.documents, want.selection.documents)


@pytest.mark.parametrize(
    "written, use, seen",
    [(0, 2, [0, 0]), (1, 2, [1, 0]), (2, 1, [0, 1]), (2, 2, [1, 1]), (3, 1, [1, 0]), (3, 2, [1, 1]), (3, 0, [0, 0])],
)
def test_only_the_last_batches_are_seen(written, use, seen):
    model = model_of()
    batches = [batch_of(i, (10 * i, 10 * i + 1, 10 * i + 2)) for i in range(1, 4)]
    recent = ring(model, batches[:written]) if written else no_recent(encode(model, batches[0].documents), Q)
    now = batch_of(9, (90, 91, 92))
    bank, asked = with_recent(encode(model, now.documents), now, recent, np.int32(use))
    want = np.repeat(np.array([1, *seen], bool), N)
    np.testing.assert_array_equal(asked.visible, np.broadcast_to(want, (B, 3 * N)))
    shown = scores(model, bank, asked) > -1e3
    np.testing.assert_array_equal(shown, np.broadcast_to(want, shown.shape))


@pytest.mark.slow
def test_without_recent_batches_the_loss_and_its_gradient_are_those_of_the_batch():
    model, now = model_of(), BATCHES[0]
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    training = TrainingConfig(phases=(Phase(steps=9),), optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0))
    optimizer = make_optimizer(training)

    def stepped(batches):
        copy = jax.tree.map(lambda x: x.copy(), params)
        recent = empty_recent(graphdef, copy, now, batches) if batches else None
        state = init_state(copy, optimizer, training, recent=recent)
        return make_step(graphdef, optimizer, training, (5, 6))(state, now, phase_values(training.phases[0]))

    (plain, metrics), (kept, their_metrics) = stepped(0), stepped(2)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(kept.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # a step of 0.1, so a gradient that differs shows
    assert metrics["loss"] == pytest.approx(float(their_metrics["loss"]), abs=1e-5)
    assert plain.recent is None and int(kept.recent.written) == 1
    np.testing.assert_array_equal(kept.recent.identities[0], now.identities)


def test_only_tokens_that_route_are_scored():
    """What does not route is left out of the product, and changes nothing."""
    model, now = model_of(), BATCHES[0]
    bank = encode(model, now.documents)
    want = ask(model, bank, now.questions, (5, 6))
    got = ask(model, bank, now.questions, (5, 6), max_routing=4)
    np.testing.assert_allclose(got.document_scores, want.document_scores, atol=1e-6)
    np.testing.assert_allclose(got.hidden, want.hidden, atol=1e-5)
    fewer = ask(model, bank, now.questions, (5, 6), max_routing=2)
    assert np.abs(fewer.document_scores - want.document_scores).max() > 1e-3


def test_a_batch_beyond_its_limits_is_refused():
    training = TrainingConfig(phases=(Phase(steps=1),), max_routing=3)
    with pytest.raises(ConfigError, match=r"4 tokens that route and training.max_routing is 3"):
        check_limits(BATCHES[0], training)
    with pytest.raises(ConfigError, match="recent must not be negative"):
        Phase(steps=1, recent=-1)
