"""bAbI: its files are read as they are, and a question sees the earlier statements of its own story alone."""

import numpy as np
import pytest

from msa_jax.data import BabiSource, Renderer, Template, Tokenizer
from msa_jax.data.pipeline import make_dataset
from msa_jax.data.sources.babi import read_stories
from msa_jax.errors import DataError

PEOPLE, PLACES = ("Mary", "John", "Sandra"), ("garden", "office", "kitchen")


def story(first):
    """Six statements and two questions; the second is asked of everything but the last statement."""
    a, b = PEOPLE[first % 3], PEOPLE[(first + 1) % 3]
    x, y = PLACES[first % 3], PLACES[(first + 2) % 3]
    return [
        f"1 {a} got the milk there.",
        f"2 {a} went to the {x}.",
        f"3 Where is the milk? \t{x}\t1 2",
        f"4 {b} moved to the {y}.",
        f"5 {a} left the milk.",
        f"6 {a} journeyed to the {y}.",
        f"7 Where is the milk? \t{x}\t5 2",
        f"8 {b} went to story {first}.",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("babi")
    lines = [line for i in range(23) for line in story(i)]
    (folder / "qa2_two-supporting-facts_train.txt").write_text("\n".join(lines) + "\n")
    (folder / "qa2_two-supporting-facts_test.txt").write_text("\n".join(story(99)))
    (folder / "qa1_single_train.txt").write_text("1 Mary went to the office.\n2 Where is Mary?\toffice\t1\n" * 3)
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return BabiSource(folder, (2,), eval_fraction=0.3)


@pytest.fixture(scope="module")
def tokenizer(source):
    return Tokenizer.train(source.texts(), 420, Template.compact(id_digits=2))


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_file_is_read_as_it_stands(folder):
    (one,) = read_stories(folder, 2, "test")
    assert one.numbers == [1, 2, 4, 5, 6, 8] and one.asked_at == [3, 7]
    assert [d.text for d in one.documents][2:4] == ["John moved to the kitchen.", "Mary left the milk."]
    assert [(q.question, q.answers) for q in one.questions] == [("Where is the milk?", ("garden",))] * 2
    # The order of the file is the order of the hops.
    lines = [[int(name.removeprefix("qa2:test:0:")) for name in q.supporting_ids] for q in one.questions]
    assert lines == [[1, 2], [5, 2]]
    assert len(read_stories(folder, 1, "train")) == 3


def test_splits_share_no_story_and_lose_none(folder, source):
    parts = [{s.documents[-1].text for s in BabiSource(folder, (2,), p, 0.3).stories} for p in ("train", "eval")]
    assert len(parts[0]) + len(parts[1]) == len(parts[0] | parts[1]) == 23 and all(parts)
    assert len(source) == len(parts[0])
    assert len(BabiSource(folder, (1, 2), eval_fraction=1e-9)) == 26


@pytest.mark.parametrize("count, room", [(1, 6), (5, 17), (11, 18), (40, 13)])
def test_an_episode_shows_each_question_what_came_before_it(source, count, room):
    indices = rng(count).integers(len(source), size=count)
    episode = source.episode(indices.tolist(), room, rng(), 2)
    assert len(episode.documents) == room and len(episode.questions) == count
    stories = {s.id: s for s in source.stories}
    shown = {d.id.rsplit(":", 1)[0] for d in episode.documents}
    allowed = {source.stories[i].id for i in indices}
    for question, seen in zip(episode.questions, episode.visible, strict=True):
        name, line = question.id.rsplit(":", 1)
        assert name in allowed & shown
        before = [d.id for d, n in zip(stories[name].documents, stories[name].numbers, strict=True) if n < int(line)]
        assert [d.id for d, v in zip(episode.documents, seen, strict=True) if v] == before
    for document, number in zip(episode.documents, episode.numbers, strict=True):
        assert document.id.endswith(f":{number}")
    # All questions of the stories are asked equally often, or once more.
    times = np.unique([q.id for q in episode.questions], return_counts=True)[1]
    whole = len({q.id.rsplit(":", 1)[0] for q in episode.questions}) * 2
    assert times.max() - times.min() <= 1 and len(times) == min(count, whole)


def test_batches_of_steps_mean_what_the_stories_say(source, tokenizer):
    renderer = Renderer(tokenizer, 40)
    shape = dict(num_documents=25, num_questions=14, chunk_size=8, row_len=40, question_len=140, samples="steps")
    batch = next(iter(make_dataset(source, tokenizer, seed=3, **shape)))
    chunks = batch.documents.tokens.reshape(-1, 8)
    numbers = [tokenizer.parse_numbers(chunks[i : i + 3].ravel())[:1] for i in batch.documents.starts]
    answers = {renderer.answer(place)[0] for place in PLACES}
    for i in range(14):
        sees, wants = batch.questions.visible[i], batch.questions.relevant[i]
        assert sees[wants].all() and sees.sum() in (2, 5)
        target = batch.questions.tokens[i][batch.questions.loss_weights[i] > 0]
        if wants.any():
            assert [tokenizer.parse_numbers(target)] == [numbers[j] for j in np.flatnonzero(wants)]
        else:
            assert target[1] in answers


@pytest.mark.parametrize(
    "line, message",
    [
        ("Mary went.", "qa3_x_train.txt:3: not in bAbI's format, 'Mary went.'"),
        ("3 Where is Mary?\toffice", "not in bAbI's format"),
        ("3 Where is Mary?\toffice\t2", "not in bAbI's format"),
        ("3 Where is Mary?\toffice\t9", "not in bAbI's format"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "qa3_x_train.txt").write_text(f"1 Mary went to the office.\n2 Where is Mary?\toffice\t1\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_stories(tmp_path, 3, "train")


def test_what_cannot_work_is_said(folder, source, tmp_path):
    with pytest.raises(DataError, match="must hold one qa7_.*_train.txt and has 0"):
        BabiSource(folder, (7,))
    with pytest.raises(DataError, match="no story fits num_documents 5: the shortest of 2 has 6 statements"):
        source.episode([0, 1], 5, rng())
    with pytest.raises(DataError, match="num_documents is 999 and there are"):
        source.episode([0], 999, rng())
    with pytest.raises(DataError, match="eval.py --task=babi"):
        source.memory(10, 1, rng())
