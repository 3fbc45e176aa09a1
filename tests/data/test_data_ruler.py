"""RULER's tasks: as the benchmark defines them, split, nested, streamed, and rendered with every wanted document."""

import collections
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from msa_jax.data import Renderer, RulerSource, Tokenizer
from msa_jax.data.episodes import render_episode
from msa_jax.data.haystacks.ruler_documents import RulerDocuments
from msa_jax.data.haystacks.ruler_tasks import DEPTHS, NOISE, TASKS, ruler_words
from msa_jax.data.haystacks.uuids import draw_uuids, word_pattern
from msa_jax.errors import DataError

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (.+?) is: ([0-9a-f-]+)\.")
# Haystack, kinds of key and value, needle keys, values of each, keys asked for: RULER's synthetic.yaml.
DEFINED = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needles", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needles", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}


@pytest.fixture(scope="module")
def spoken(haystack) -> Tokenizer:
    words = ruler_words()
    texts = [*haystack, NOISE * 20, *draw_uuids(np.random.default_rng(0), 2500), *words["adjective"], *words["noun"]]
    texts += [TASKS["niah_single_1"].needle("red-apple", "1") + TASKS["niah_single_3"].question(["red-apple"])] * 50
    return Tokenizer.train(texts, 2500, word_pattern=word_pattern())


@pytest.fixture(scope="module")
def make(haystack, spoken):
    return lambda **options: RulerSource(
        haystack, spoken, **{"document_tokens": 117, "eval_fraction": 0.4, "split": "eval", **options}
    )


@pytest.fixture(scope="module")
def ruler(make) -> RulerSource:
    return make()


def rng(seed=0):
    return np.random.default_rng(seed)


def remember(source, *args, **options):
    """Questions, documents and numbers of a memory."""
    questions, blocks = source.memory(*args, **options)
    blocks = list(blocks)
    return questions, [d for docs, _ in blocks for d in docs], [n for _, numbers in blocks for n in numbers]


def needles_of(documents):
    return [(i, *match.groups()) for i, d in enumerate(documents) for match in NEEDLE.finditer(d.text)]


@pytest.mark.parametrize("name", DEFINED)
def test_a_memory_has_the_haystack_the_needles_and_the_questions_of_its_task(ruler, name):
    haystack, key, value, keys, values, queries = DEFINED[name]
    questions, documents, _ = remember(ruler, 211, 5, rng(3), task=name)
    assert len(questions) == 5 and len(documents) == 211
    found = needles_of(documents)
    kinds, needle_keys, needle_values = ([row[i] for row in found] for i in (1, 2, 3))
    assert set(kinds) == {value}
    assert all(re.fullmatch(r"[1-9]\d{6}" if value == "numbers" else UUID, v) for v in needle_values)
    adjectives, nouns = map(set, ruler_words().values())
    for k in needle_keys:
        parts = [(k[:i], k[i + 1 :]) for i, letter in enumerate(k) if letter == "-"]
        assert re.fullmatch(UUID, k) if key == "uuids" else any(a in adjectives and n in nouns for a, n in parts)
    if haystack == "needles":
        assert len(found) == 211 and len({row[0] for row in found}) == 211
    else:
        assert len(found) == 5 * keys * values
    if haystack == "noise":
        lines = [[line for line in d.text.split("\n") if line != NOISE] for d in documents]
        assert all(len(own) <= 1 and all(NEEDLE.fullmatch(line) for line in own) for own in lines)
        assert {d.text for d, own in zip(documents, lines, strict=True) if not own} == {"\n".join([NOISE] * 3)}
    at = {d.id: i for i, d in enumerate(documents)}
    for question in questions:
        assert len(question.wanted) == queries * values == len(question.supporting_ids)
        asked = [row for row in found if str(row[2]) in question.question]
        assert sorted(row[3] for row in asked) == sorted(question.wanted)
        assert len({row[2] for row in asked}) == queries
        assert sorted(at[i] for i in question.supporting_ids) == sorted(row[0] for row in asked)
        # Values stand in the order of the documents, and these in the order of their numbers.
        assert [NEEDLE.search(documents[at[i]].text)[3] for i in question.supporting_ids] == list(question.wanted)
        assert list(map(int, question.supporting_ids)) == sorted(map(int, question.supporting_ids))
        assert question.answers == (", ".join(question.wanted),)


def test_what_is_asked_reads_as_in_the_benchmark():
    single, many = TASKS["niah_single_3"], TASKS["niah_multiquery"]
    asked = single.question(["red-apple"])
    assert asked == "What is the special magic uuid for red-apple mentioned in the provided text?"
    asked = many.question(["a-b", "c-d", "e-f", "g-h"])
    assert asked == "What are all the special magic numbers for a-b, c-d, e-f, and g-h mentioned in the provided text?"
    assert TASKS["niah_multivalue"].question(["a-b"]).startswith("What are all the special magic numbers for a-b men")
    assert single.needle("red-apple", "x") == "One of the special magic uuids for red-apple is: x."
    assert set(TASKS) == set(DEFINED)


def test_needles_in_text_lie_at_the_forty_depths(ruler):
    assert len(DEPTHS) == 40 and DEPTHS[0] == 0 and DEPTHS[-1] == 100 and (np.diff(DEPTHS) >= 2).all()
    documents = 4001
    questions, blocks = ruler.memory(documents, 7, rng(5), task="niah_multivalue")
    held = [d.id for docs, _ in blocks for d in docs]
    at = {identity: i for i, identity in enumerate(held)}
    exact = [round(d / 100 * (documents - 1)) for d in DEPTHS]
    seen = collections.Counter()
    for question in questions:
        near = [min(range(40), key=lambda j: abs(exact[j] - at[i])) for i in question.supporting_ids]
        assert len(set(near)) == 4, "a question's needles lie at different depths"
        assert all(abs(exact[j] - at[i]) < 28 for j, i in zip(near, question.supporting_ids, strict=True))
        seen.update(near)
    assert len(seen) > 15
    spread = ruler.memory(documents, 50, rng(5), task="niah_single_1")[0]
    assert len(spread) == 50


def test_what_lies_behind_a_memory_is_only_more_of_its_haystack(ruler):
    for name in ("niah_multikey_1", "niah_multikey_2", "niah_single_1"):
        every = np.random.default_rng(1).permutation(10**7)[:901]
        questions, documents, numbers = remember(ruler, 83, 6, rng(8), task=name, numbers=every[:83])
        wanted = {i for q in questions for i in q.supporting_ids}
        assert wanted <= {d.id for d in documents}
        asked = {row[2] for row in needles_of(documents) if documents[row[0]].id in wanted}
        more, behind = zip(*ruler.haystack(name, every[83:], rng(9), questions=questions), strict=True)
        more = sum(more, [])
        assert numbers + sum(behind, []) == every.tolist() and [d.id for d in more] == list(map(str, every[83:]))
        assert not [row for row in needles_of(more) if row[2] in asked]
        distinct = len({d.text for d in more})
        assert distinct == 1 if name == "niah_single_1" else distinct > 810
        again = [d.text for docs, _ in ruler.haystack(name, every[83:], rng(9), questions=questions) for d in docs]
        assert again == [d.text for d in more]
        if name == "niah_multikey_1":
            depths = sorted(i for i, d in enumerate(documents) if NEEDLE.search(d.text))
            assert len(depths) == 24 and depths[0] < 12 and 70 < depths[-1] < 83
            # Text has no needles of its own, so that all tasks in text may share it.
            assert not needles_of(more)


def test_no_needle_of_the_haystack_has_a_key_that_is_asked_for(make, monkeypatch):
    few = {"adjective": ["red", "old", "odd"], "noun": ["cat", "dog", "owl"]}
    monkeypatch.setattr("msa_jax.data.sources.ruler.ruler_words", lambda: few)
    source = make(eval_fraction=0.5)
    questions, documents, _ = remember(source, 300, 2, rng(1), task="niah_multikey_2")
    keys = collections.Counter(row[2] for row in needles_of(documents))
    for more, _ in source.haystack("niah_multikey_2", np.arange(300), rng(2), questions=questions):
        keys.update(row[2] for row in needles_of(more))
    assert [keys[q.id.split(":")[1]] for q in questions] == [1, 1]
    assert len(keys) == 9 and sum(keys.values()) == 600


def test_text_that_runs_out_is_cut_at_other_places(ruler):
    """Nine times the text's passages: every stretch is another, and all of them are real text."""
    count = 9 * len(ruler)
    _, documents, _ = remember(ruler, count, 1, rng(2), task="niah_single_2")
    texts = [d.text for d in documents]
    assert len(set(texts)) > 0.99 * count
    bodies = [d.tokens.tobytes() for d in documents]
    assert len(set(bodies)) > 0.99 * count


def test_a_memory_is_made_as_it_is_read(ruler, monkeypatch):
    made = []
    documents = RulerDocuments.documents
    monkeypatch.setattr(RulerDocuments, "documents", lambda *a: made.append(0) or documents(*a))
    _, blocks = ruler.memory(140_000, 3, rng(), task="niah_multikey_2", block_size=50)
    assert not made
    first = list(itertools.islice(blocks, 3))
    assert len(made) == 3 and [len(docs) for docs, _ in first] == [50, 50, 50]


def test_the_same_draws_give_the_same_memory_whatever_else_the_draws_are_for(ruler, make):
    for name in TASKS:
        first, second = rng(4), rng(4)
        questions, blocks = ruler.memory(150, 3, first, task=name)
        first.random(9)
        same = remember(make(), 150, 3, second, task=name)
        assert questions == same[0]
        assert [d.text for docs, _ in blocks for d in docs] == [d.text for d in same[1]]
        other = remember(ruler, 150, 3, rng(5), task=name)
        assert other[0] != same[0] and other[2] != same[2]


def test_no_key_that_evaluation_asks_for_occurs_in_training(make):
    train, held_out = make(split="train"), make(hard_fraction=0.0)
    seen = set()
    for seed in range(30):
        seen |= {row[2] for row in needles_of(train.episode(range(seed, seed + 16), 48, rng(seed)).documents)}
    keys, words = set(), set()
    for seed in range(6):
        for name in ("niah_multiquery", "niah_multikey_3"):
            questions, _ = held_out.memory(300, 60, rng(seed), task=name)
            keys |= {key for question in questions for key in question.id.split(":")[1:]}
    assert len(seen) > 900 and len(keys) > 1500 and not seen & keys
    words = {w for key in seen for w in key.split("-")} & {w for key in keys for w in key.split("-")}
    assert words, "words of keys do occur in both"


def test_an_episode_asks_all_tasks_alike_and_holds_all_their_documents(make):
    train = make(split="train", eval_fraction=0.3)
    for first, count in ((0, 16), (13, 24)):
        episode = train.episode(range(first, first + count), 60, rng(first))
        asked = collections.Counter(question.id.split(":")[0] for question in episode.questions)
        assert asked == dict.fromkeys(TASKS, count // 8)
        by_id = {d.id: d for d in episode.documents}
        assert len(by_id) == 60
        for question in episode.questions:
            found = [NEEDLE.search(by_id[i].text) for i in question.supporting_ids]
            assert [f[3] for f in found] == list(question.wanted)
            assert {f[2] for f in found} == set(question.id.split(":")[1:])
            others = [row for row in needles_of(episode.documents) if row[2] in question.id]
            assert len(others) == len(found), "no other document answers it"


EPISODE = """
import hashlib, json, sys
import numpy as np
from msa_jax.data import RulerSource, Tokenizer

texts = json.load(open(sys.argv[1] + "/texts.json"))
source = RulerSource(texts, Tokenizer.load(sys.argv[1]), document_tokens=117, eval_fraction=0.4)
episode = source.episode(range(8), 24, np.random.default_rng(1))
print(hashlib.sha256("".join(d.text for d in episode.documents).encode()).hexdigest())
"""


@pytest.mark.slow
def test_episodes_are_the_same_in_every_process(haystack, spoken, root, tmp_path):
    """Python hashes strings differently in each, and a run that goes on is in another one."""
    spoken.save(tmp_path)
    (tmp_path / "texts.json").write_text(json.dumps(haystack))
    made = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", EPISODE, str(tmp_path)]
        made.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(made) == 1


def test_distractors_of_an_episode_follow_their_shares(make):
    words = []
    for hard in (0.0, 1.0):
        source = make(hard_fraction=hard)
        keys = [k for s in range(9) for _, _, k, _ in needles_of(source.episode([s], 40, rng(s)).documents)]
        words.append(len({k.split("-")[0] for k in keys if not re.fullmatch(UUID, k)}))
    assert words[1] < 0.6 * words[0]
    few = make(needle_fraction=0.0, tasks=("niah_single_2",)).episode([0, 1, 2], 40, rng())
    assert len(needles_of(few.documents)) == 3


def test_documents_are_as_long_as_they_may_be_and_encode_as_they_stand(make, ruler, spoken):
    renderer = Renderer(spoken, 117)
    for name in TASKS:
        _, documents, numbers = remember(ruler, 64, 3, rng(1), task=name)
        for document, number in zip(documents, numbers, strict=True):
            assert spoken.encode(" " + document.text) == document.tokens.tolist()
            assert len(renderer.render_document(document, number)) <= 117
    assert any("numbers" in d.text for d in make(split="train").episode([0], 50, rng()).documents)


def test_all_wanted_documents_are_named_in_one_turn_and_then_read(make, spoken):
    episode = make(split="train").episode(range(8), 60, rng(1))
    renderer = Renderer(spoken, 117)
    rendered = render_episode(renderer, episode, rng(), samples="at_once")
    end = spoken.token_id(spoken.template.reference_end)
    for question, sample, relevant in zip(episode.questions, rendered.samples, rendered.relevant, strict=True):
        prompt = len(renderer.prompt(question.question)[0])
        turn = sample.tokens[prompt : sample.tokens.index(end, prompt) + 1]
        assert spoken.parse_numbers(turn) == list(map(int, question.supporting_ids))
        assert turn.count(end) == 1 and all(w == 1.0 for w in sample.weights[prompt : prompt + len(turn)])
        quoted = spoken.decode(sample.tokens[prompt + len(turn) :])
        places = [quoted.index(value) for value in question.wanted]
        assert places == sorted(places) and spoken.decode(sample.tokens).endswith(f"{question.answers[0]}<|im_end|>")
        assert relevant.sum() == len(question.wanted)
        if len(question.wanted) == 1:
            found = [(d, int(d.id)) for d in episode.documents if d.id == question.supporting_ids[0]]
            assert sample == renderer.sample(question, found), "one document: as in a chain"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("niah_single_9",)}, "no RULER task 'niah_single_9'; the tasks are niah_single_1"),
        ({"tasks": ()}, "no RULER task is given"),
        ({"document_tokens": 60}, "needle of .* takes up to .* raise document_tokens by"),
        ({"eval_fraction": 1.0}, "eval_fraction"),
    ],
)
def test_what_does_not_fit_is_refused(make, options, said):
    with pytest.raises(DataError, match=said):
        make(**options)


def test_memories_and_episodes_that_cannot_be_are_refused(ruler, make):
    with pytest.raises(DataError, match="8; choose one"):
        ruler.memory(100, 2, rng())
    with pytest.raises(DataError, match="12 needles.* 11 documents"):
        ruler.memory(11, 3, rng(), task="niah_multivalue")
    with pytest.raises(DataError, match="have 17 needles.*num_documents is 16"):
        ruler.episode(range(8), 16, rng())
    assert remember(make(tasks=("niah_single_2",)), 20, 2, rng())[0]


def test_without_wonderwords_a_sentence_says_what_to_install(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(DataError, match=r"not installed; install msa-jax\[ruler\]"):
        make()
