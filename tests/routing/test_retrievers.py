"""Retrievers beside the exact one: what each promises, over spread documents, and in a model that asks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax import routing
from msa_jax.ask.__main__ import open_session, parser
from msa_jax.bank.quantization import quantize
from msa_jax.context import Route
from msa_jax.errors import ConfigError, QuestionError
from msa_jax.inference.explain import explain_question
from msa_jax.inference.explanation import explanation_of
from msa_jax.memory import DocumentLayout, LayerMemory, MemoryBank
from msa_jax.memory.selection import Selection
from msa_jax.routing import NO_SCORE, Query
from msa_jax.routing.candidates import scores_of
from msa_jax.routing.two_level import TwoLevel
from msa_jax.runs.build import train_run
from msa_jax.runs.config import RunConfig
from msa_jax.sharding import MeshConfig
from tests.inference.scripted import Scripted, names
from tests.inference.small import ASK, ENGINE, QUESTIONS, corpus_of, model_of, renderer

B, T, N, C, K, D, GROUP, TOP = 2, 3, 11, 24, 2, 3, 2, 3
GROUPS = -(-N // GROUP)
FORMS = ("float32", "bfloat16", "int8", "stacked")


def memory_of(form, seed, lengths, near):
    """Documents in two halves of the chunks, some of them absent; keys of a group lie within `near` of each other."""
    rng = np.random.default_rng(seed)
    owners = np.full(C, N, np.int32)
    used = np.repeat(np.arange(N), lengths)
    owners[1 : 1 + len(used)] = used
    keys = rng.normal(size=(GROUPS + 1, K, D))[owners // GROUP] + near * rng.normal(size=(C, K, D))
    keys = np.array(routing.routing_key(jnp.asarray(keys, jnp.float32), score="cosine"))
    layout = DocumentLayout.from_chunk_documents(owners, N).replace(max_length=2)
    content = jnp.zeros((1, C, K, D))
    keys = keys.astype(jnp.bfloat16) if form == "bfloat16" else keys
    if form == "int8":
        return quantize(MemoryBank(keys[None], content, content, layout)).layer(0)
    keys[owners == N] = np.nan  # a chunk of no document may hold anything
    if form == "stacked":
        return LayerMemory(jnp.stack([keys[::-1], keys]), None, None, layout, index=jnp.int32(1))
    return LayerMemory(jnp.asarray(keys), None, None, layout)


@functools.partial(jax.jit, static_argnames="retriever")
def routed(retriever, query, memory, visible):
    return retriever.route(query, memory, visible, TOP)


@functools.partial(jax.jit, static_argnames="retriever")
def exactly(retriever, query, memory, visible):
    """Bounds of the groups, all scores, the exact selection, and scores asked for by number."""
    scores, selection = routing.retriever_of("exact", memory.layout).route_with_scores(query, memory, visible, TOP)
    everyone = jnp.broadcast_to(jnp.arange(N), (B, N))
    return retriever.bounds(query, memory, visible), scores, selection, scores_of(query, memory, everyone)


def same(got: Selection, want: Selection):
    """Equal scores are those of equal documents, or of a tie."""
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-6)
    np.testing.assert_array_equal(got.lengths > 0, want.lengths > 0)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31), near=st.sampled_from([0.0, 0.05, 0.3, 2.0]),
    lengths=st.lists(st.integers(0, 2), min_size=N, max_size=N), some=st.booleans(),
)  # fmt: skip
def test_two_levels_find_all_that_scores_above_the_groups_they_leave(form, seed, near, lengths, some):
    memory, rng = memory_of(form, seed, lengths, near), np.random.default_rng(seed)
    vectors = rng.normal(size=(B, T, K * D)).astype(np.float32)
    query = Query(jnp.asarray(vectors), jnp.asarray(rng.random((B, T)) < 0.8))
    visible = jnp.asarray(rng.random((B, N)) < (0.7 if some else 1.0))
    few, all_of_them = TwoLevel(group=GROUP, groups=TOP), TwoLevel(group=GROUP, groups=GROUPS)
    bounds, scores, want, named = exactly(few, query, memory, visible)
    best = np.full((B, GROUPS * GROUP), NO_SCORE, np.float32)
    best[:, :N] = scores
    best = best.reshape(B, GROUPS, GROUP).max(2)
    assert (bounds >= best - 1e-5).all()  # no document scores above its group's bound
    left = np.sort(bounds, axis=1)[:, -TOP - 1] + 1e-5  # the largest bound of what is not read
    got = routed(few, query, memory, visible)
    for b in range(B):
        certain = np.asarray(want.scores[b]) > left[b]
        np.testing.assert_allclose(got.scores[b][certain], want.scores[b][certain], atol=1e-6)
        chosen = np.asarray(got.documents[b])[np.asarray(got.lengths[b]) > 0]
        np.testing.assert_allclose(np.asarray(scores)[b, chosen], np.asarray(got.scores)[b, : len(chosen)], atol=1e-6)
        assert len(set(chosen)) == len(chosen) and np.asarray(visible)[b, chosen].all()
    same(routed(all_of_them, query, memory, visible), want)
    seen = np.asarray(scores) > NO_SCORE / 2
    np.testing.assert_allclose(np.asarray(named)[seen], np.asarray(scores)[seen], atol=1e-6)


def test_of_documents_that_lie_together_few_groups_hold_the_best():
    memory, rng = memory_of("float32", 0, [2] * N, 0.02), np.random.default_rng(1)
    query = Query(jnp.asarray(rng.normal(size=(B, T, K * D)), jnp.float32), jnp.ones((B, T), bool))
    bounds, _, want, _ = exactly(TwoLevel(group=GROUP, groups=TOP), query, memory, None)
    assert (np.asarray(want.scores)[:, -1] > np.sort(bounds, axis=1)[:, -TOP - 1]).all()
    got = routed(TwoLevel(group=GROUP, groups=1), query, memory, None)  # as many groups as documents, at least
    np.testing.assert_array_equal(got.documents, want.documents)


@pytest.mark.parametrize("setting", ["exact", "approximate", f"two_level:group={GROUP}"])
def test_a_memory_that_is_spread_is_routed_over_alike(setting):
    rng = np.random.default_rng(3)
    owners = np.concatenate([np.repeat(np.arange(4), (1, 2, 2, 1)), np.repeat(np.arange(4, 8), (2, 1, 1, 2))])
    layout = DocumentLayout.from_chunk_documents(owners, 8)
    memory = LayerMemory(jnp.asarray(rng.normal(size=(12, K * D)), jnp.float32), None, None, layout)
    query = Query(jnp.asarray(rng.normal(size=(B, T, K * D)), jnp.float32), jnp.ones((B, T), bool))
    visible = jnp.asarray(rng.random((B, 8)) < 0.8)
    want = jax.jit(lambda m: routing.retriever_of("exact", layout).route(query, m, visible, TOP))(memory)
    over = memory.replace(layout=layout.replace(axes=("memory",)))
    with jax.set_mesh(MeshConfig(memory=2).make(jax.devices()[:2])):
        got = jax.jit(lambda m: routing.retriever_of(setting, m.layout).route(query, m, visible, TOP))(over)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)


def answers(retriever):
    config = dataclasses.replace(ENGINE, slots=1, prefill_rows=1, decode_steps=1, reported_documents=2)
    layers = dict(num_layers=2, router_layers=(0, 1))
    engine = Scripted(model_of(retriever=retriever, **layers), renderer(), corpus_of(**layers), config)
    engine.scripts = {QUESTIONS[0]: names(4) + names(30)}
    return engine.ask(QUESTIONS[:1], config=ASK)


def test_a_model_asks_with_two_levels_by_its_setting_alone():
    want, got = list(answers("exact")), list(answers("two_level:group=2,groups=3"))
    for mine, theirs in zip(got, want, strict=True):
        assert mine.text == theirs.text and len(mine.rounds) > 1
        for one, other in zip(mine.rounds, theirs.rounds, strict=True):
            np.testing.assert_array_equal(one.documents, other.documents)
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
        assert [c.number for c in mine.citations] == [c.number for c in theirs.citations]
        assert mine.score == pytest.approx(theirs.score, abs=1e-6)


REFUSED = "needs the score of every document, and retriever 'two_level' scores only some: take one of exact"


def test_who_needs_the_score_of_every_document_is_told_of_a_retriever_without(tmp_path):
    model = model_of(retriever="two_level")
    tokens, roles = renderer().prompt(QUESTIONS[0])
    with pytest.raises(ConfigError, match=f"^explain {REFUSED}"):
        explain_question(model, renderer().prefix, tokens, roles, corpus_of().bank)
    with pytest.raises(QuestionError, match=f"^explain {REFUSED}"):
        explanation_of(model, renderer(), corpus_of(), corpus_of().view(None), QUESTIONS[0], documents=1)
    options = parser().parse_args(["--bank=b", "--workdir=w", "--explain", "--set=retriever=two_level", "what"])
    with pytest.raises(ConfigError, match=f"^--explain {REFUSED}"):
        open_session(options, ASK, ENGINE)
    run = RunConfig.from_dict(dict(model=dict(retriever="two_level"), training=dict(phases=[dict(steps=1)])))
    with pytest.raises(ConfigError, match=f"^training {REFUSED}"):
        train_run(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    ask = lambda tokens: model.prefill(tokens, read=Route(corpus_of().bank, want=("scores",)))  # noqa: E731
    with pytest.raises(ConfigError, match=f"^return_scores {REFUSED}"):
        jax.eval_shape(ask, jnp.zeros((1, 3), jnp.int32))


def test_scores_are_given_to_those_who_want_them():
    model, tokens = model_of(), jnp.zeros((1, 3), jnp.int32)
    output = nnx.eval_shape(lambda: model.prefill(tokens, read=Route(corpus_of().bank)))
    assert output.document_scores is None and output.selection.documents.shape == (2, 1, 2)
