"""Long documents of a corpus become several, and questions follow the answer."""

from msa_jax.data import CorpusSource, Document, Question
from msa_jax.data.sources import cut_documents


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
    assert first.supporting_ids[-1] == "short"
    assert len(first.supporting_ids) > 1 and all("Nupa Rose" in texts[i] for i in first.supporting_ids[:-1])
    assert second.supporting_ids == ("long/1",)
    assert third.supporting_ids == ("short",)


def test_nothing_changes_where_all_fits(tokenizer):
    cut = cut_documents(corpus(), tokenizer, 10_000)
    assert (cut.documents, cut.questions) == (corpus().documents, corpus().questions)
