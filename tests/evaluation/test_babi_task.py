"""A bank of stories: each question routes to, and can read, the earlier statements of its own story alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from msa_jax.data import Document, Question
from msa_jax.data.sources.babi import Story
from msa_jax.errors import QuestionError
from msa_jax.evaluation import stories
from msa_jax.evaluation.stories import StoryCorpus
from msa_jax.evaluation.tasks import babi
from msa_jax.inference import AskConfig, Budget, EngineConfig
from msa_jax.inference.answer import Event
from msa_jax.inference.engine import Engine
from tests.inference.small import TEXTS, model_of, renderer

LINES = {"a": [1, 2, 4, 5], "b": [1, 3, 4]}


def make(name, asked_at):
    documents = [Document(f"{name}:{n}", "", text) for n, text in zip(LINES[name], TEXTS.values(), strict=False)]
    wanted = [tuple(f"{name}:{n}" for n in LINES[name] if n < line)[-2:] for line in asked_at]
    questions = [Question(f"{name}:{n}", "which", ("north",), w) for n, w in zip(asked_at, wanted, strict=True)]
    return Story(name, documents, LINES[name], questions, asked_at)


STORIES = [make("a", [3, 6]), make("b", [4])]
CONFIG = EngineConfig(slots=1, context=32, lengths=(), prefill_rows=1, decode_steps=2, reported_documents=9)


def corpus_of_stories():
    return StoryCorpus(model_of(), renderer(), STORIES, row_len=48)


def test_what_a_question_sees(monkeypatch):
    monkeypatch.setattr(stories, "encode_bank", lambda *_, **__: None)
    corpus = corpus_of_stories()
    view = corpus.view(["a@4"])
    places = np.arange(len(corpus))
    seen = np.asarray(corpus.visibility.of(view.allowed[None], np.array([view.seen])))[0]
    assert corpus.numbers(places[seen]).tolist() == [1, 2] and seen.sum() == 2 and len(corpus) == 7
    assert corpus.find(2, view).document.id == "a:2" and corpus.find(2, view).namespace == "a"
    assert corpus.find(4, view) is None and corpus.find(3, view) is None
    assert corpus.find(1, corpus.view(["b@4"])).document.id == "b:1"
    for wrong in (["c@4"], ["a"], None):
        with pytest.raises(QuestionError, match="name one as a@7"):
            corpus.view(wrong)


def answer(named, best, text="north"):
    """An answer that named these documents in turn, each router layer's best of every routing being `best`."""
    rounds = [SimpleNamespace(documents=np.array([[first, -1], [second, -1]])) for first, second in best]
    events = [Event("read", number) for number in named]
    return SimpleNamespace(text=text, events=events, rounds=rounds, citations=named)


def test_scores_by_hop():
    story = STORIES[0]  # wanted are 1 and 2, then 4 and 5
    found = [
        (story, 0, answer([1, 2], [(1, 1), (2, 1), (1, 1)])),
        (story, 0, answer([1], [(2, 1), (1, 2)], "south")),
        (story, 1, answer([1, 5], [(4, 1), (5, 5), (5, 5)])),
    ]
    rows = [babi.score(*one) for one in found]
    assert [row["id_of_hop"] for row in rows] == [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    assert [row["chain"] for row in rows] == [1.0, 0.0, 0.0] and [row["answer"] for row in rows] == [1.0, 0.0, 1.0]
    # The second hop's routing counts only where the first went right.
    routed = [row["best_of_hop"] for row in rows]
    assert routed == [[[1, 1], [1, 0]], [[0, 1], [0, 1]], [[1, 0], None]]
    total = babi.summary(rows)
    assert total["id_of_hop"] == pytest.approx([2 / 3, 2 / 3]) and total["chain"] == pytest.approx(1 / 3)
    assert [total[f"router_recall@1_of_hop_{hop}"] for hop in (1, 2)] == [[0.6667, 0.6667], [0.5, 0.5]]
    assert total["documents_read"] == pytest.approx(5 / 3)


def test_the_kinds_of_second_hops():
    texts = ["Mary went to the garden.", "Mary got the milk there.", "Mary left the milk.", "Mary moved to the office."]
    documents = [Document(f"s:{n}", "", text) for n, text in enumerate(texts, 1)]
    early, late = Question("e", "Where is the milk?", ("garden",), ("s:2", "s:1")), ("s:3", "s:1")
    story = Story("s", documents, [1, 2, 3, 4], [early, Question("l", "?", ("x",), late)], [3, 6])
    assert [babi.kind(story, i) for i in (0, 1)] == ["the person's latest place", "an earlier place of the person"]
    assert babi.kind(STORIES[0], 0) == "the person's latest place"


def test_the_questions_of_all_stories_are_asked_together():
    engine = Engine(model_of(), renderer(), corpus_of_stories(), CONFIG)
    found = babi.asked(engine, STORIES, AskConfig(mode="latent", budget=Budget(answer_tokens=2)))
    assert [(story.id, i) for story, i, _ in found] == [("a", 0), ("a", 1), ("b", 0)]
    for story, i, reply in found:
        before = {n for n in story.numbers if n < story.asked_at[i]}
        assert set(reply.rounds[0].documents.ravel().tolist()) - {-1} <= before
        assert len(before) <= CONFIG.reported_documents
