"""Several folders as one corpus, pairs beside questions, and hard negatives from a file."""

import json
from collections import Counter

import numpy as np
import pytest

from msa_jax.data import CorpusSource, Document, JsonlSource, Question, cut_documents
from msa_jax.data.corpora.negatives import with_negatives, write_negatives
from msa_jax.errors import DataError

TEXT = "This is passage {} of the first kind. It holds {} words or so."


def rows(first: int, count: int) -> list[dict]:
    return [{"id": f"d{i}", "title": f"Name {i}", "text": TEXT.format(i, i)} for i in range(first, first + count)]


def question(i: int, *supporting: int) -> dict:
    ids = [f"d{j}" for j in supporting]
    return {"id": f"q{i}", "question": f"Which one is {i}?", "answers": [str(i)], "supporting_ids": ids}


@pytest.fixture
def folders(tmp_path, write_rows):
    """Passages 0 to 29 with questions, 20 to 49 with questions about both folders', 40 to 69 without questions."""
    for name, first in (("a", 0), ("b", 20), ("c", 40)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "documents.jsonl", rows(first, 30))
    write_rows(tmp_path / "a" / "questions.jsonl", [question(i, i) for i in range(12)])
    write_rows(tmp_path / "b" / "questions.jsonl", [question(i, i + 10, 5) for i in range(12, 25)])
    return [tmp_path / name for name in "abc"]


def test_folders_are_merged(folders):
    source = JsonlSource(folders, "train", 0.3)
    assert [d.id for d in source.documents] == [f"d{i}" for i in range(70)]
    both = source.questions + JsonlSource(folders, "eval", 0.3).questions
    assert sorted(int(q.id[1:]) for q in both) == list(range(25))
    assert all(q.answers for q in both), "no pairs unless asked for"
    first = JsonlSource(folders[0], "train", 0.3).questions
    assert first == source.questions[: len(first)]


def test_what_differs_between_folders_is_refused(folders, write_rows):
    changed = rows(25, 3)
    changed[1]["text"] += " And more."
    changed[2]["title"] = "Another"
    write_rows(folders[2] / "documents.jsonl", changed)
    with pytest.raises(DataError, match="document 'd26' has another title or text in a folder before") as failure:
        JsonlSource(folders)
    assert "'d27'" in str(failure.value) and "'d25'" not in str(failure.value)
    assert str(folders[2] / "documents.jsonl") in str(failure.value)


def test_questions_need_their_documents_in_some_folder_and_an_id_of_their_own(folders, write_rows):
    with pytest.raises(DataError, match="supporting id 'd5' names no document"):
        JsonlSource(folders[1:])
    write_rows(folders[2] / "questions.jsonl", [question(3, 41)])
    with pytest.raises(DataError, match="question 'q3' is in a folder before this one"):
        JsonlSource(folders)
    with pytest.raises(DataError, match="no folder was given"):
        JsonlSource([])
    with pytest.raises(DataError, match="pair_fraction must be at least 0 and below 1, got 1"):
        JsonlSource(folders, pair_fraction=1)


@pytest.mark.parametrize("fraction", [0.25, 0.8, 0.98])
def test_pairs_have_their_share_of_the_slots_of_training(folders, fraction):
    train = JsonlSource(folders, "train", 0.3, pair_fraction=fraction)
    slots = Counter(q.id for q in train.questions)
    pairs = sum(count for name, count in slots.items() if ":" in name)
    assert abs(pairs / len(train) - fraction) < 0.08
    kinds = {name.partition(":")[0] if ":" in name else "question" for name in slots}
    assert kinds == {"title", "sentence", "question"}
    for kind in (True, False):
        assert len({count for name, count in slots.items() if (":" in name) == kind}) == 1, "each as often"
    evaluation = JsonlSource(folders, "eval", 0.3, pair_fraction=fraction)
    assert evaluation.questions == JsonlSource(folders, "eval", 0.3).questions
    assert {q.id for q in evaluation.questions}.isdisjoint(slots)
    assert len(list(train.texts())) == len(train.documents) + len(slots), "a question is once in the texts"


def test_blocks_begin_with_their_title_and_fit(tokenizer):
    long = "Bacodi fuge limo. " * 12
    documents = [Document("short", "Nu pa", "Bacodi."), Document("long", "Co di", long), Document("none", "", long)]
    documents.append(Document("title", "Bacodi fuge limo " * 9, "Bacodi."))
    source = CorpusSource(documents, [Question("q", "?", (), ("long",))])
    cut = cut_documents(source, tokenizer, 30, titles=True)
    texts = {d.id: d.text for d in cut.documents}
    assert texts["short"] == "Nu pa: Bacodi." and texts["title"] == "Bacodi."
    blocks = [text for name, text in texts.items() if name.startswith("long/")]
    assert len(blocks) > 2 and "".join(b.removeprefix("Co di: ") for b in blocks) == long
    assert all(b.startswith("Co di: ") for b in blocks)
    assert max(len(tokenizer.encode(" " + text)) for text in texts.values()) <= 30
    assert "".join(text for name, text in texts.items() if name.startswith("none/")) == long


def test_a_sentence_asks_for_the_block_it_stands_in(tokenizer):
    text = "Bacodi fuge limo. " * 12 + "Nupa Rose seti ba co. " + "Gelimo banu. " * 12
    hidden = "Nupa Rose seti ba co."
    source = CorpusSource([Document("d", "", text)], [Question("q", hidden, (), ("d",), hidden=hidden)])
    cut = cut_documents(source, tokenizer, 40)
    (name,) = cut.questions[0].supporting_ids
    assert name != "d/1"
    for episode in (cut.episode([0], len(cut.documents), np.random.default_rng(0)),):
        shown = {d.id: d.text for d in episode.documents}
        assert hidden not in shown[name] and len(shown[name]) > 20


def test_hard_negatives_are_in_the_episodes_of_their_questions(folders, tmp_path):
    source = JsonlSource(folders, "train", 0.3, pair_fraction=0.8)
    path = tmp_path / "negatives.jsonl"
    first, second = (i for i, q in enumerate(source.questions) if q.id in ("title:d60", "title:d61"))
    wrong = [f"d{i}" for i in range(40, 44)]
    write_negatives(path, {"title:d60": wrong, "another": ["gone"]})
    mixed = with_negatives(source, path, 3)
    counts = Counter()
    for seed in range(60):
        held = {d.id for d in mixed.episode([first, second], 8, np.random.default_rng(seed)).documents}
        assert {"d60", "d61"} <= held and len(held) == 8 and len(held & set(wrong)) >= 3
        counts.update(held & set(wrong))
    assert len(counts) == 4, "drawn, not always the first"
    alone = [{d.id for d in mixed.episode([second], 8, np.random.default_rng(s)).documents} for s in range(60)]
    assert sum(len(held & set(wrong)) for held in alone) < 60
    tight = mixed.episode([first, second], 3, np.random.default_rng(0))
    assert len(tight.documents) == 3, "as far as there is room"


def test_files_of_negatives_that_do_not_fit(folders, tmp_path):
    source = JsonlSource(folders, "train", 0.3)
    path = tmp_path / "negatives.jsonl"
    with pytest.raises(DataError, match="cannot be read"):
        with_negatives(source, path, 1)
    path.write_text(json.dumps({"question": "q1"}) + "\n")
    with pytest.raises(DataError, match="holds no hard negatives"):
        with_negatives(source, path, 1)
    write_negatives(path, {"nobody": ["d1"]})
    with pytest.raises(DataError, match="negatives for none of"):
        with_negatives(source, path, 1)
    write_negatives(path, {source.questions[0].id: ["d1", "d1/2"]})
    with pytest.raises(DataError, match="'d1/2', which is not there"):
        with_negatives(source, path, 1)


def test_real_folders_share_passages_and_become_one_corpus(test_data):
    folders = [test_data / "data" / name for name in ("hotpotqa", "2wikimultihopqa", "musique")]
    source = JsonlSource(folders, "train", 0.5, pair_fraction=0.9, hidden_fraction=0.5)
    alone = sum(len(JsonlSource(folder, "train", 0.5).documents) for folder in folders)
    assert 9_000 < len(source.documents) < alone, "some are in two folders"
    pairs = sum(not q.answers for q in source.questions)
    assert abs(pairs / len(source) - 0.9) < 0.03
    asked = {q.question for q in JsonlSource(folders, "eval", 0.5).questions}
    assert 400 < len(asked) < 600 and asked.isdisjoint(q.question for q in source.questions)
