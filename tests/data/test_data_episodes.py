"""Episodes: what is refused, and which samples, masks and targets come of them."""

import itertools

import numpy as np
import pytest

from msa_jax.data import CorpusSource, Document, Episode, Question, Renderer, fitting_questions
from msa_jax.data.episodes import longest_sample, render_episode
from msa_jax.data.pipeline import make_dataset
from msa_jax.errors import DataError

DOCUMENT = Document("a", "Title", "Bacodi fuge. Limo 12!")
OTHER = Document("b", "", "Nupa rose")
THIRD = Document("c", "", "Other")
TWO = Question("q", "Bacodi where?", ("Fuge 12", "unused"), ("a", "b"))
ONE = Question("r", "Nupa?", ("x",), ("b",))
EPISODE = Episode([OTHER, THIRD, DOCUMENT], [5, 6, 7], [TWO, ONE])
VISIBLE = np.array([[True, True, True], [True, False, True]])


def render(tokenizer, episode=EPISODE, seed=0, **options):
    return render_episode(Renderer(tokenizer), episode, np.random.default_rng(seed), **options)


def targets(tokenizer, sample):
    return tokenizer.decode([t for t, w in zip(sample.tokens, sample.weights, strict=True) if w > 0])


def test_a_chain_marks_all_its_documents(tokenizer):
    found = render(tokenizer)
    assert found.relevant.tolist() == [[True, False, True], [True, False, False]]
    assert found.visible.all()
    assert [tokenizer.parse_numbers(d) for d in found.documents] == [[5, 5], [6, 6], [7, 7]]
    assert tokenizer.parse_numbers(found.samples[0].tokens) == [7, 7, 7, 5, 5, 5]  # named, then quoted with two ids
    assert tokenizer.parse_numbers(found.samples[1].tokens) == [5, 5, 5]


def test_every_step_of_a_chain_is_drawn_and_wants_the_next_document(tokenizer):
    seen = {0: {}, 1: {}}
    for seed in range(60):
        found = render(tokenizer, seed=seed, samples="steps")
        assert found.visible.all()
        for i, sample in enumerate(found.samples):
            read = len(tokenizer.parse_numbers(sample.tokens)) // 3
            case = (targets(tokenizer, sample), tuple(found.relevant[i].tolist()))
            assert seen[i].setdefault(read, case) == case
    spelt = tokenizer.format_number
    end = "<|object_ref_end|>"
    assert seen[0] == {
        0: (spelt(7) + end, (False, False, True)),
        1: (spelt(5) + end, (True, False, False)),
        2: ("<End-of-Retrieve>Fuge 12<|im_end|>", (False, False, False)),
    }
    assert seen[1] == {
        0: (spelt(5) + end, (True, False, False)),
        1: ("<End-of-Retrieve>x<|im_end|>", (False, False, False)),
    }


def test_steps_are_equally_likely(tokenizer):
    many = Episode(EPISODE.documents, EPISODE.numbers, [TWO] * 600)
    read = [len(tokenizer.parse_numbers(s.tokens)) // 3 for s in render(tokenizer, many, samples="steps").samples]
    assert min(np.bincount(read)) > 160


def test_a_step_without_answers_ends_with_retrieval(tokenizer):
    question = Question("q", "Nupa?", (), ("b",))
    sample = Renderer(tokenizer).step(question, [(OTHER, 4)], 1)
    assert targets(tokenizer, sample) == "<End-of-Retrieve>" == tokenizer.decode(sample.tokens[-1:])


@pytest.mark.parametrize("form", ["chain", "steps"])
def test_the_unanswerable_see_none_of_their_documents_and_say_so(tokenizer, form):
    many = Episode(EPISODE.documents, EPISODE.numbers, [TWO, ONE] * 300)
    found = render(tokenizer, many, samples=form, unanswerable=0.25)
    refused = "<End-of-Retrieve>" + tokenizer.template.not_found + "<|im_end|>"
    refuses = np.array([targets(tokenizer, s) == refused for s in found.samples])
    assert 0.18 < refuses.mean() < 0.32
    wanted = np.array([[True, False, True], [True, False, False]] * 300)
    assert (found.visible == ~(wanted & refuses[:, None])).all()
    assert not found.relevant[refuses].any()
    for sample, question in zip(found.samples, many.questions, strict=True):
        if targets(tokenizer, sample) == refused:
            expected = Renderer(tokenizer).prompt(question.question)[0] + Renderer(tokenizer).end_of_retrieve()
            expected += Renderer(tokenizer).restated(question.question)
            assert sample.tokens == expected + Renderer(tokenizer).answer(tokenizer.template.not_found)
            assert sample.roles.count(0) == Renderer(tokenizer).prompt(question.question)[1].count(0)


def test_an_episodes_own_visibility_is_kept(tokenizer):
    found = render(tokenizer, Episode(EPISODE.documents, [5, 6, 7], [TWO, ONE], VISIBLE), unanswerable=0.999)
    assert found.visible.tolist() == [[False, True, False], [False, False, True]]
    assert VISIBLE.sum() == 5  # the episode's is another array


def test_nothing_is_drawn_for_what_is_off(tokenizer):
    rng = np.random.default_rng(3)
    render_episode(Renderer(tokenizer), EPISODE, rng)
    assert rng.random() == np.random.default_rng(3).random()


def test_no_sample_is_longer_than_is_said(tokenizer):
    renderer, short = Renderer(tokenizer), Document("b", "", "")
    for question, supporting in ((TWO, [DOCUMENT, OTHER]), (ONE, [short])):
        numbered = [(d, 4) for d in supporting]
        steps = [len(renderer.step(question, numbered, i).tokens) for i in range(len(supporting) + 1)]
        refusal = len(renderer.refusal(question).tokens)
        assert steps == sorted(steps) and steps[-1] == longest_sample(renderer, question, supporting)
        assert longest_sample(renderer, question, supporting, unanswerable=True) == max(steps[-1], refusal)
    source = CorpusSource([short], [ONE])
    with pytest.raises(DataError, match=f"the shortest takes {refusal} tokens"):
        fitting_questions(source, renderer, refusal - 1, unanswerable=True)
    assert steps[-1] < refusal and len(fitting_questions(source, renderer, refusal - 1)) == 1


@pytest.mark.parametrize(
    ("documents", "numbers", "questions", "visible", "message"),
    [
        ([DOCUMENT], [1, 2], [], None, "one number a document"),
        ([DOCUMENT, OTHER], [1, 1], [], None, "numbers of an episode must differ"),
        ([DOCUMENT, DOCUMENT], [1, 2], [], None, "ids of an episode must differ"),
        ([DOCUMENT], [1], [TWO], None, "'q' is supported by 'b', which is not among"),
        ([OTHER, THIRD], [1, 1], [ONE], [[True, True]], "'r' sees 2 documents of the number 1"),
        ([OTHER, THIRD], [1, 2], [ONE], [[False, True]], "'r' is supported by 'b', which it may not see"),
        ([OTHER, THIRD], [1, 2], [ONE], [[True]], r"visible must be \[questions, documents\] \(1, 2\)"),
    ],
)
def test_inconsistent_episodes_are_refused(documents, numbers, questions, visible, message):
    with pytest.raises(DataError, match=message):
        Episode(documents, numbers, questions, None if visible is None else np.array(visible))


def test_numbers_may_repeat_among_documents_that_nobody_sees_together():
    episode = Episode([OTHER, THIRD, DOCUMENT], [1, 1, 2], [ONE], np.array([[True, False, True]]))
    assert episode.numbers == [1, 1, 2] and len(episode.documents) == 3


def test_batches_hold_steps_and_refusals(corpus, tokenizer):
    shapes = dict(num_documents=21, num_questions=9, chunk_size=5, row_len=105, document_len=40, question_len=240)
    batches = make_dataset(corpus, tokenizer, **shapes, seed=0, samples="steps", unanswerable=0.3)
    wanted, hidden = [], []
    for batch in itertools.islice(batches, 9):
        wanted += batch.questions.relevant.sum(1).tolist()
        hidden += (~batch.questions.visible).sum(1).tolist()
    assert set(wanted) == {0, 1} and set(hidden) == {0, 2}
    assert 0.15 < np.mean(np.array(hidden) > 0) < 0.5
