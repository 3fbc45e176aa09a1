"""Long documents of a corpus become several, and questions follow the answer."""

import logging

import pytest

from msa_jax.data import CorpusSource, Document, Question, Renderer, cut_documents, fitting_questions
from msa_jax.errors import DataError


def corpus():
    long = "Bacodi fuge limo. " * 12 + "Nupa Rose seti. " + "Gelimo banu. " * 12
    documents = [Document("short", "a", "Bacodi fuge."), Document("long", "b", long)]
    questions = [
        Question("q1", "where", ("nupa rose",), ("long", "short")),
        Question("q2", "what", ("nowhere",), ("long",)),
        Question("q3", "which", (), ("short",)),
    ]
    return CorpusSource(documents, questions)


def test_texts_are_kept_and_fit(tokenizer):
    cut = cut_documents(corpus(), tokenizer, 40)
    assert all(len(tokenizer.encode(" " + d.text)) <= 40 for d in cut.documents)
    parts = [d for d in cut.documents if d.id.startswith("long/")]
    assert len(parts) > 2 and [d.id for d in parts] == [f"long/{i + 1}" for i in range(len(parts))]
    assert "".join(d.text for d in parts) == corpus().documents[1].text
    assert {d.title for d in parts} == {"b"}
    assert cut.documents[0] == corpus().documents[0]


def test_questions_follow_their_answer(tokenizer):
    cut = cut_documents(corpus(), tokenizer, 40)
    texts = {d.id: d.text for d in cut.documents}
    first, second, third = cut.questions
    assert len(first.supporting_ids) == 2 and first.supporting_ids[1] == "short"
    assert first.supporting_ids[0] != "long/1" and "Nupa Rose" in texts[first.supporting_ids[0]]
    assert second.supporting_ids == ("long/1",)
    assert third.supporting_ids == ("short",)


def test_nothing_changes_where_all_fits(tokenizer):
    cut = cut_documents(corpus(), tokenizer, 10_000)
    assert (cut.documents, cut.questions) == (corpus().documents, corpus().questions)


def test_questions_that_do_not_fit_are_left_out(tokenizer, caplog):
    renderer = Renderer(tokenizer, 60)
    source = cut_documents(corpus(), tokenizer, renderer.body_len)
    documents = {d.id: d for d in source.documents}
    sizes = [len(renderer.sample(q, [(documents[i], 0) for i in q.supporting_ids]).tokens) for q in source.questions]
    assert sizes[2] < sizes[1] < sizes[0]
    with caplog.at_level(logging.WARNING):
        fitting = fitting_questions(source, renderer, sizes[1])
    assert [q.id for q in fitting.questions] == ["q2", "q3"] and fitting.documents == source.documents
    assert "1 of 3 questions" in caplog.text and f"takes {sizes[0]}" in caplog.text
    with pytest.raises(DataError, match=f"the shortest takes {sizes[2]} tokens"):
        fitting_questions(source, renderer, sizes[2] - 1)
