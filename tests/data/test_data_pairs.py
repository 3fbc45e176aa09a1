"""Documents that ask for themselves: which titles and sentences do, and what an episode hides from them."""

import numpy as np
import pytest

from msa_jax.data import CorpusSource, Document, JsonlSource, Question
from msa_jax.data.corpora.pairs import make_pairs

SENTENCES = ("Town {} lies on a big river.", "It has {} old bridges now.", "Some {} people live here today.")


def towns(count: int) -> list[Document]:
    texts = [" ".join(sentence.format(i) for sentence in SENTENCES) for i in range(count)]
    return [Document(f"d{i}", f"Town {i}", text) for i, text in enumerate(texts)]


def write(folder, documents, write_rows):
    write_rows(folder / "documents.jsonl", [{"id": d.id, "title": d.title, "text": d.text} for d in documents])


def test_titles_and_sentences_ask_for_their_document():
    documents = towns(40)
    pairs = make_pairs(documents)
    titles = [q for q in pairs if q.id.startswith("title:")]
    assert [q.question for q in titles] == [d.title for d in documents]
    asking = {q.supporting_ids[0]: q for q in pairs if q.id.startswith("sentence:")}
    assert len(asking) == 40 and all(q.answers == () and len(q.supporting_ids) == 1 for q in pairs)
    chosen = [
        [s.format(i) for s in SENTENCES].index(asking[document.id].question) for i, document in enumerate(documents)
    ]
    assert set(chosen) == {0, 1, 2}, "not always the same sentence"
    assert asking == {q.supporting_ids[0]: q for q in make_pairs(documents[::-1]) if q.hidden}, "by the id alone"


def test_what_is_ambiguous_or_too_little_asks_nothing():
    documents = [
        Document("a", "Twice", "A first sentence of a. And more about it here then."),
        Document("b", "Twice", "A first sentence of b. And more about it here then."),
        Document("short", "", "Too short. It has more words than five in it."),
        Document("alone", "", "One sentence of many words that stands all alone."),
        Document("echo", "", "Here it says one thing. Here it says one thing."),
        Document("same1", "", "They all say this and no more. They all say this and no more?"),
    ]
    found = {q.id: q.question for q in make_pairs(documents)}
    assert not any(name.startswith("title:") for name in found)
    assert {"sentence:alone", "sentence:echo"}.isdisjoint(found)
    for question in found.values():
        assert sum(question in d.text for d in documents) == 1 and len(question.split()) >= 5


def test_without_questions_pairs_are_asked_and_split(tmp_path, write_rows):
    write(tmp_path, towns(60), write_rows)
    train, evaluation = (JsonlSource(tmp_path, split, 0.3) for split in ("train", "eval"))
    assert train.documents == evaluation.documents == towns(60), "documents are whole"
    everything = {q.id for q in make_pairs(towns(60))}
    assert {q.id for q in train.questions} | {q.id for q in evaluation.questions} == everything
    assert {q.id for q in train.questions}.isdisjoint(q.id for q in evaluation.questions)
    assert 20 < len(evaluation) < 55


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_an_episode_hides_the_sentence_that_asks(fraction):
    documents = towns(30)
    source = CorpusSource(documents, make_pairs(documents), hidden_fraction=fraction)
    hidden = whole = 0
    for seed in range(20):
        episode = source.episode(range(0, 60, 3), 25, np.random.default_rng(seed))
        shown = {d.id: d.text for d in episode.documents}
        asked = {q.supporting_ids[0]: q for q in episode.questions if q.hidden}
        for name, text in shown.items():
            full = documents[int(name[1:])].text
            if name in asked and text != full:
                assert asked[name].hidden not in text and len(text) == len(full) - len(asked[name].hidden) - 1
                hidden += 1
            else:
                assert text == full
                whole += name in asked
    assert hidden + whole == 20 * len(asked)
    assert abs(hidden / (hidden + whole) - fraction) < 0.12


def test_hiding_leaves_other_questions_and_short_documents_alone():
    documents = [Document("a", "", "All of it asks here now."), Document("b", "", "Other words of another one.")]
    questions = [Question("q", "?", (), ("a",), hidden="All of it asks here now."), Question("p", "?", (), ("b",))]
    episode = CorpusSource(documents, questions).episode([0, 1], 2, np.random.default_rng(0))
    assert sorted(d.text for d in episode.documents) == sorted(d.text for d in documents)
