"""Choosing the threshold of abstention, and the benchmark that measures what it does."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import abstention, separation
from msa_jax.bank import encode_bank
from msa_jax.data import Document, NeedleSource, Question, Renderer, Tokenizer, frequent_words, training_texts
from msa_jax.evaluation.memories import build_memory
from msa_jax.inference import AskConfig, Budget, Engine, EngineConfig, FixedLibrary, Round, Threshold, choose_threshold
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


@given(LISTS, LISTS)
def test_separation_against_all_pairs(inside, outside):
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(inside, outside)]
    inside, outside = np.array(inside), np.array(outside)
    assert separation.auroc(inside, outside) == pytest.approx(np.mean(pairs))
    best = separation.most_accurate(inside, outside)
    kept, refused = effect(best["value"], inside, outside)
    assert best["accuracy"] == pytest.approx((kept + refused) / 2)
    assert best["accuracy"] >= max(sum(effect(v, inside, outside)) / 2 for v in [*inside, *outside]) - 1e-12


def test_a_threshold_is_used_on_the_half_that_it_was_not_chosen_on():
    inside, outside = np.array([0.9, 0.5, 0.9, 0.5]), np.array([0.6, 0.1, 0.6, 0.1])
    # 0.75 of the even half refuses all of the odd one, 0.3 of the odd half nothing of the even one.
    assert separation.held_out(inside, outside) == dict(kept=0.5, refused=0.5)


def test_ranking_and_margin():
    numbers = np.array([[7, 3, 9], [3, 8, -1]])
    scores = np.array([[0.9, 0.8, 0.1], [0.7, 0.6, -9]], np.float32)
    first = Round(numbers, scores, "", (), "all", "", 1)
    # 7 and 9 are not among the best of the second layer, and count there as 8 does.
    assert separation.ranking(first) == pytest.approx({3: 0.75, 7: 0.75, 9: 0.35, 8: 0.35})
    assert separation.margin(first) == pytest.approx(0, abs=1e-6)
    assert separation.margin(Round(numbers[:1], scores[:1], "", (), "all", "", 1)) == pytest.approx(0.1)
    assert separation.margin(Round(numbers[:1, :1], scores[:1, :1], "", (), "all", "", 1)) == 0


class Shared:
    """Questions of which two need the same document."""

    def memory(self, num_documents, num_questions, rng, *, id_digits):
        needed = [("a",), ("b",), ("c",), ("b", "d")][:num_questions]
        questions = [Question(str(i), f"q{i}", ("x",), ids) for i, ids in enumerate(needed)]
        documents = [Document(name, "", name) for name in "abcdefgh"[:num_documents]]
        return questions, iter([(documents[1:2], [11]), (documents[2:] + documents[:1], [*range(20, 28)][:7])])


def test_a_question_whose_document_is_left_out_is_not_asked():
    absent = abstention.Absent(Shared())
    asked, blocks = absent.memory(6, 2, np.random.default_rng(0))
    assert [q.id for q in asked] == ["0"] and [q.id for q in absent.questions] == ["2", "3"]
    # The first block had but a document that is left out. Numbers stay with their documents.
    [(documents, numbers)] = blocks
    assert ["".join(d.id for d in documents), numbers] == ["efgha", [22, 23, 24, 25, 26]]


WORDS = "river stone cloud field paper light music garden window market winter summer bridge letter copper".split()


@pytest.fixture(scope="module")
def small():
    """A run, its needles, its renderer and its model, not trained."""
    rng = np.random.default_rng(0)
    texts = [" ".join(" ".join(rng.choice(WORDS, 9)) + "." for _ in range(30)) for _ in range(40)]
    model = dict(preset="tiny", hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_size=32,
                 chunk_size=16, top_k=4)  # fmt: skip
    evaluation = dict(batch_size=1, rows_per_step=8, max_rounds=1, max_new_tokens=16)
    data = dict(document_len=80, num_words=12)
    run = RunConfig.from_dict(dict(model=model, data=data, evaluation=evaluation, tokenizer=dict(vocab_size=640),
                                   training=dict(phases=[dict(steps=1)])))  # fmt: skip
    template = run.tokenizer.make_template()
    tokenizer = Tokenizer.train(training_texts(texts, num_words=12), 640, template)
    source = NeedleSource(texts, frequent_words(texts, tokenizer, 12), tokenizer, document_tokens=80, split="eval",
                          eval_fraction=0.5)  # fmt: skip
    return run, source, Renderer(tokenizer, 80), make_model(run, tokenizer)


def test_what_is_asked_for_in_vain_is_nowhere_in_the_memory(small):
    run, source, renderer, _ = small
    absent = abstention.Absent(source)
    memory = build_memory(
        absent, renderer, memory_tokens=2000, num_questions=9, chunk_size=16, row_len=run.row_len(16), seed=3
    )
    texts = "\n".join(document.text for document in memory.originals.values())
    key = lambda question: "-".join(abstention.KEY.search(question.question).groups())  # noqa: E731
    assert len(memory.questions) == len(absent.questions) == 9
    assert all(f" {key(q)} " in texts and q.supporting_ids[0] in memory.place for q in memory.questions)
    assert not any(f" {key(q)} " in texts or q.supporting_ids[0] in memory.place for q in absent.questions)
    assert 0.9 * 2000 < memory.tokens < 1.1 * 2000 and len(memory.numbers) == len(memory.originals)
    hard = abstention.confusable(memory, absent.questions)
    for question, found in zip(absent.questions, hard, strict=True):
        first, second = key(question).split("-")
        assert found == (f" {first}-" in texts and f"-{second} is" in texts)
    assert abstention.confusable(memory, [Question("0", "Where is it?", (), ())]) is None


def test_the_benchmark_from_questions_to_the_picture(small, tmp_path, capsys, monkeypatch):
    run, source, renderer, model = small
    (tmp_path / "config.json").write_text(json.dumps(run.to_dict()))
    monkeypatch.setattr(abstention, "load_model", lambda *_: (model, renderer))
    monkeypatch.setattr(abstention, "make_source", lambda *_: source)
    flags = {"workdir": tmp_path, "memory_tokens": "900,1500", "questions": 6, "out": tmp_path / "a.json",
             "plot": tmp_path / "a.png"}  # fmt: skip
    monkeypatch.setattr("sys.argv", ["abstention", *(f"--{k}={v}" for k, v in flags.items())])
    abstention.main()
    record = json.loads((tmp_path / "a.json").read_text())
    assert "--memory_tokens 900,1500 --questions 6" in record["command"] and record["device"]
    first, second = record["rows"]
    assert first["documents"] < second["documents"] and first["questions"] == {"in memory": 6, "not in memory": 6}
    for row in record["rows"]:
        found, lowest = row["score"], row["quantiles"]["in memory"]["0"]
        chosen = found[separation.CHOSEN]
        assert chosen["kept"] == 1 and chosen["value"] <= lowest  # of six none may be lost
        assert len(row["unanswerable, not refused"]) == round(6 * (1 - chosen["refused"]))
        assert found[separation.FIRST]["value"] == first["score"][separation.CHOSEN]["value"]
        assert row["quantiles"]["in memory"] != row["quantiles"]["not in memory"]
        assert 0 <= found["auroc"] <= 1 and 0 <= row["unanswerable, without a threshold"]["answers"] <= 1
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("| score |") == 2


def test_the_engine_refuses_what_the_threshold_refuses(small):
    run, source, renderer, model = small
    memory = build_memory(
        source, renderer, memory_tokens=1200, num_questions=8, chunk_size=16, row_len=run.row_len(16), seed=1
    )
    library = FixedLibrary(encode_bank(model, memory.packed, rows_per_step=8), memory.originals)
    engine = Engine(model, renderer, library, EngineConfig(slots=4, context=192, lengths=(64,)))
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
