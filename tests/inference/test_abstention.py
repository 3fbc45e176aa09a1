"""Choosing the threshold of abstention, and what it does."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_jax.bank import encode_bank
from msa_jax.data import NeedleSource, Renderer, Tokenizer, frequent_words, training_texts
from msa_jax.evaluation.memories import build_memory
from msa_jax.inference import AskConfig, Budget, Engine, EngineConfig, FixedCorpus, Threshold, choose_threshold
from msa_jax.runs.build import make_model
from msa_jax.runs.config import RunConfig

# Few values, so that ties are common, and some that have nothing in between.
SCORES = st.one_of(
    st.integers(-4, 4).map(lambda n: n / 4),
    st.integers(0, 3).map(lambda n: 0.5 + n * 2**-53),
    st.floats(-1e308, 1e308),
)
LISTS = st.lists(SCORES, min_size=1, max_size=40)
KEEPS = st.one_of(st.integers(1, 100).map(lambda n: n / 100), st.floats(0, 1, exclude_min=True))


def effect(value, wanted, unwanted):
    return sum(s >= value for s in wanted) / len(wanted), sum(s < value for s in unwanted) / len(unwanted)


@given(LISTS, LISTS, KEEPS)
def test_no_threshold_that_keeps_enough_refuses_more_or_keeps_more(wanted, unwanted, keep):
    found = choose_threshold(wanted, unwanted, keep=keep)
    assert (found.kept, found.refused) == effect(found.value, wanted, unwanted)
    every = [effect(value, wanted, unwanted) for value in [*wanted, *unwanted, math.inf]]
    assert (found.refused, found.kept) == max((refused, kept) for kept, refused in every if kept >= keep)


@given(LISTS, KEEPS)
def test_without_others_it_loses_as_many_as_it_may(wanted, keep):
    found = choose_threshold(wanted, keep=keep)
    assert found.refused is None and found.kept == effect(found.value, wanted, [0])[0]
    assert found.kept == min(kept for kept, _ in (effect(value, wanted, [0]) for value in wanted) if kept >= keep)


def test_it_lies_in_the_middle_of_the_gap():
    wanted, unwanted = [0.9, 0.8, 0.95], [0.2, 0.6, 0.4]
    found = choose_threshold(wanted, unwanted)
    assert found.value == pytest.approx(0.7) and (found.kept, found.refused) == (1, 1)
    # Losing one for 0.85 is worth it only if it may be lost.
    assert choose_threshold(wanted, [0.2, 0.85], keep=0.6).value == pytest.approx(0.875)
    assert choose_threshold(wanted, [0.2, 0.85], keep=0.7).value == pytest.approx(0.5)
    assert choose_threshold(wanted, keep=0.6).value == pytest.approx(0.85)
    assert choose_threshold(wanted, [0.97], keep=0.6).value == 0.8  # there is nothing to refuse
    assert choose_threshold([1.5e308], [1e308]).value == 1.25e308


def test_equal_scores_stay_together():
    found = choose_threshold([0.5, 0.5, 0.5, 0.75], [0.5, 0.25], keep=0.5)
    assert (found.kept, found.refused, found.value) == (1, 0.5, 0.375)
    assert choose_threshold([1.0] * 100, [1.0] * 3) == Threshold(value=1.0, kept=1.0, refused=0.0)


@pytest.mark.parametrize("keep, lost", [(0.99, 1), (0.999, 0), (1, 0), (0.07, 93), (0.14, 86), (0.29, 71)])
def test_of_a_hundred(keep, lost):
    """0.07 * 100 is above 7 in floating point."""
    assert choose_threshold(range(100), keep=keep).kept == (100 - lost) / 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([],), "in_memory_scores is empty"),
        (([0.5], []), "not_in_memory_scores is empty"),
        (([0.5, None],), "in_memory_scores must be finite numbers, got None"),
        (([0.5], [math.nan]), "not_in_memory_scores must be finite numbers, got nan"),
        (([math.inf], [0.1]), "in_memory_scores must be finite numbers, got inf"),
    ],
)
def test_scores_that_cannot_be_used(arguments, message):
    with pytest.raises(ValueError, match=f"^choose_threshold: {message}"):
        choose_threshold(*arguments)


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, math.nan])
def test_shares_that_cannot_be_kept(keep):
    with pytest.raises(ValueError, match="keep must be above 0 and at most 1"):
        choose_threshold([0.5], keep=keep)


WORDS = "river stone cloud field paper light music garden window market winter summer bridge letter copper".split()


@pytest.fixture(scope="module")
def small():
    """A run, its needles, its renderer and its model, not trained."""
    rng = np.random.default_rng(0)
    texts = [" ".join(" ".join(rng.choice(WORDS, 9)) + "." for _ in range(30)) for _ in range(40)]
    model = dict(preset="tiny", hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_size=32,
                 chunk_size=16, top_k_documents=4)  # fmt: skip
    evaluation = dict(batch_size=1, rows_per_step=8, max_rounds=1, max_new_tokens=16)
    data = dict(document_len=80, num_words=12)
    run = RunConfig.from_dict(dict(model=model, data=data, evaluation=evaluation, tokenizer=dict(vocab_size=640),
                                   training=dict(phases=[dict(steps=1)])))  # fmt: skip
    template = run.tokenizer.make_template()
    tokenizer = Tokenizer.train(training_texts(texts, num_words=12), 640, template)
    source = NeedleSource(texts, frequent_words(texts, tokenizer, 12), tokenizer, document_tokens=80, split="eval",
                          eval_fraction=0.5)  # fmt: skip
    return run, source, Renderer(tokenizer, 80), make_model(run, tokenizer)


def test_the_engine_refuses_what_the_threshold_refuses(small):
    run, source, renderer, model = small
    memory = build_memory(
        source, renderer, memory_tokens=1200, num_questions=8, chunk_size=16, row_len=run.row_len(16), seed=1
    )
    corpus = FixedCorpus(encode_bank(model, memory.packed, rows_per_step=8), memory.originals)
    engine = Engine(model, renderer, corpus, EngineConfig(slots=4, context=192, lengths=(64,)))
    ask = lambda below: [  # noqa: E731
        engine.submit(q.question, config=AskConfig(mode="latent", budget=Budget(answer_tokens=1), abstain_below=below))
        for q in memory.questions
    ]
    pending = ask(None)
    while engine.step():
        pass
    scores = [p.result().score for p in pending]
    chosen = choose_threshold(scores, keep=0.5)
    for value, refused in ((chosen.value, 4), (sorted(scores)[2], 2), (sorted(scores)[7] + 1e-3, 8)):
        pending = ask(value)
        while engine.step():
            pass
        assert [p.result().outcome == "not_in_memory" for p in pending] == [s < value for s in scores]
        assert sum(s < value for s in scores) == refused
