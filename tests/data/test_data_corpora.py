"""Sources over a corpus: what an episode holds, the splits, and every fault of JSON lines named."""

import json
import re

import numpy as np
import pytest

from msa_jax.data import CorpusSource, Document, JsonlSource, Question
from msa_jax.data.splits import in_split, stable_hash
from msa_jax.errors import DataError


def rng(seed=0):
    return np.random.default_rng(seed)


def test_episodes_hold_all_supporting_documents_and_distinct_others(corpus):
    indices = [0, 4, 2, 0]
    episode = corpus.episode(indices, 19, rng())
    ids = [d.id for d in episode.documents]
    assert len(ids) == len(set(ids)) == len(set(episode.numbers)) == 19
    assert episode.questions == [corpus.questions[i] for i in indices]
    assert {s for q in episode.questions for s in q.supporting_ids} <= set(ids)
    assert corpus.episode(indices, 19, rng()) == episode
    other = corpus.episode(indices, 19, rng(1))
    assert [d.id for d in other.documents] != ids and other.numbers != episode.numbers
    assert len({d.id for seed in range(9) for d in corpus.episode([0], 3, rng(seed)).documents}) > 9


def test_order_and_numbers_give_nothing_away(corpus):
    """Supporting documents stand anywhere, under any number."""
    places, numbers = [], []
    for seed in range(200):
        episode = corpus.episode([1], 10, rng(seed), id_digits=2)
        places.append(episode.index_of()[corpus.questions[1].supporting_ids[0]])
        numbers.append(episode.numbers[places[-1]])
    assert set(places) == set(range(10))
    assert min(numbers) < 10 and 90 <= max(numbers) < 100


def test_a_corpus_as_one_memory(corpus):
    questions, blocks = corpus.memory(20, 4, rng(2), id_digits=3)
    ((documents, numbers),) = blocks
    assert len(documents) == len(numbers) == 20 and max(numbers) < 1000
    assert len(questions) == len({q.id for q in questions}) == 4
    assert {s for q in questions for s in q.supporting_ids} <= {d.id for d in documents}
    assert len(corpus.memory(23, 99, rng())[0]) == len(corpus)


def test_impossible_requests_are_refused(corpus):
    needed = len({s for q in corpus.questions for s in q.supporting_ids})
    with pytest.raises(
        DataError, match=f"need {needed} supporting documents and num_documents is {needed - 1}"
    ):
        corpus.episode(range(len(corpus)), needed - 1, rng())
    with pytest.raises(DataError, match="num_documents is 24 and the source has 23 documents"):
        corpus.episode([0], 24, rng())
    with pytest.raises(DataError, match="11 documents cannot have distinct numbers of 1 digits"):
        corpus.episode([0], 11, rng(), id_digits=1)
    assert sorted(corpus.episode([0], 10, rng(), id_digits=1).numbers) == list(range(10))


def test_jsonl_reads_what_is_there_and_splits_the_questions(tmp_path, write_corpus):
    write_corpus(tmp_path, 60, 59)
    train, evaluation = (JsonlSource(tmp_path, split, 0.4) for split in ("train", "eval"))
    assert train.documents == evaluation.documents and len(train.documents) == 60
    assert train.documents[3] == Document("d3", "Town 3", "Town 3 lies on river 21. It has 3 bridges.")
    expected = Question(
        "q3", "On which river lies the town after town 3?", ("river 28", "unknown"), ("d3", "d4")
    )
    assert expected in train.questions + evaluation.questions
    assert {q.id for q in train.questions}.isdisjoint(q.id for q in evaluation.questions)
    assert len(train) + len(evaluation) == 59
    assert 10 < len(evaluation) < 40
    assert list(train.texts()) == [d.text for d in train.documents] + [q.question for q in train.questions]


def test_the_split_is_the_same_on_every_machine():
    """Values recorded once: a question must not move from eval to training with a new version or process."""
    assert stable_hash("Which?") == 12553799241150130020
    evaluated = [i for i in range(20) if in_split(str(i), "eval", 0.3)]
    assert evaluated == [2, 6, 17, 18]
    assert [i for i in range(20) if not in_split(str(i), "train", 0.3)] == evaluated


GOOD_DOCUMENT = {"id": "a", "title": "T", "text": "Text."}
GOOD_QUESTION = {"id": "q", "question": "Which?", "answers": ["x"], "supporting_ids": ["a"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"{\n", r"documents\.jsonl:2: broken JSON \(.*column 2\)"),
        (json.dumps({**GOOD_DOCUMENT, "id": "b"}).encode("utf-16"), r"documents\.jsonl:2: not UTF-8"),
        ([1], "documents.jsonl:2: must be a JSON object with id, title, text, got list"),
        ({"title": None}, "documents.jsonl:2: field 'title' must be a string, got null"),
        ({"text": ["a"]}, "field 'text' must be a string"),
        ({"id": 7}, "field 'id' must be a string, got 7"),
        ({"text": ...}, "documents.jsonl:2: field 'text' is missing; give id, title, text"),
        ({"text": " \n"}, "documents.jsonl:2: document 'b' has no text"),
        ({"text": "x" * 51}, "document 'b' has 51 characters, over the limit of 50; split it"),
        ({"id": "a"}, "documents.jsonl:2: id 'a' was given in line 1 already"),
    ],
)
def test_faults_of_documents(tmp_path, change, message, write_rows):
    if isinstance(change, dict):
        change = {k: v for k, v in {**GOOD_DOCUMENT, "id": "b", **change}.items() if v is not ...}
    line = change if isinstance(change, bytes) else json.dumps(change).encode()
    (tmp_path / "documents.jsonl").write_bytes(json.dumps(GOOD_DOCUMENT).encode() + b"\n" + line)
    write_rows(tmp_path / "questions.jsonl", [GOOD_QUESTION])
    with pytest.raises(DataError, match=message) as failure:
        JsonlSource(tmp_path, max_document_chars=50)
    assert len(str(failure.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"supporting_ids": ["a", "zz"]}, r"questions\.jsonl:1: supporting id 'zz' names no document"),
        ({"supporting_ids": []}, "supporting_ids of 'q' must name at least one document"),
        ({"supporting_ids": ["a", "a"]}, "each once"),
        ({"supporting_ids": "a"}, "field 'supporting_ids' must be a list of strings"),
        ({"answers": [3]}, r"field 'answers' must be a list of strings, got \[3\]"),
        ({"answers": ...}, "field 'answers' is missing"),
        ({"question": ""}, "question 'q' is empty"),
    ],
)
def test_faults_of_questions(tmp_path, change, message, write_rows):
    write_rows(tmp_path / "documents.jsonl", [GOOD_DOCUMENT])
    row = {k: v for k, v in {**GOOD_QUESTION, **change}.items() if v is not ...}
    write_rows(tmp_path / "questions.jsonl", [row])
    with pytest.raises(DataError, match=message):
        JsonlSource(tmp_path)


def test_ten_faults_are_named_at_once(tmp_path, write_rows):
    write_rows(tmp_path / "documents.jsonl", [{"id": str(i)} for i in range(30)])
    with pytest.raises(DataError) as failure:
        JsonlSource(tmp_path)
    lines = str(failure.value).splitlines()
    assert [re.search(r":(\d+):", line).group(1) for line in lines[:-1]] == [str(i) for i in range(1, 11)]
    assert lines[-1] == "(stopped at 10 faults)"


def test_empty_and_absent_files(tmp_path, write_rows):
    with pytest.raises(DataError, match=r"documents\.jsonl does not exist"):
        JsonlSource(tmp_path)
    (tmp_path / "documents.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no documents"):
        JsonlSource(tmp_path)
    write_rows(tmp_path / "documents.jsonl", [GOOD_DOCUMENT])
    write_rows(tmp_path / "questions.jsonl", [])
    with pytest.raises(DataError, match="questions.jsonl has no question"):
        JsonlSource(tmp_path)


def test_real_folders_can_be_read(test_data):
    for name in ("hotpotqa", "2wikimultihopqa", "musique"):
        source = JsonlSource(test_data / "data" / name)
        episode = source.episode(range(9), 100, rng())
        assert len(episode.documents) == 100
        assert all(q.answers and len(q.supporting_ids) >= 2 for q in episode.questions)


def test_corpus_sources_can_be_made_by_hand():
    documents = [Document(str(i), "", f"Text {i}") for i in range(5)]
    source = CorpusSource(documents, [Question("q", "?", ("a",), ("3",))])
    assert "3" in {d.id for d in source.episode([0], 2, rng()).documents}
