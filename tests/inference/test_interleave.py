"""The state machine of Memory Interleave, on an engine whose model writes what a script says."""

import dataclasses
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax.inference import AskConfig, Budget
from msa_jax.inference.settings import MODES
from tests.inference.dictated import SCORES, Dictated
from tests.inference.scripted import names
from tests.inference.small import CONTEXT, DOCUMENTS, FEW, QUESTIONS, TEXTS, renderer

Q = QUESTIONS[0]
END = renderer().end_of_retrieve()
REFERENCE_END = names(4)[-1:]
ANSWER = renderer().answer("north")
LONG = renderer().tokenizer.encode(" the" * 9)
BUDGET = Budget(answer_tokens=6, turn_tokens=14)


@functools.cache
def engine(steps=3, context=160):
    return Dictated(steps, context)


def tell(*turns, mode="generate", namespaces=None, changes=(), **budget):
    config = AskConfig(mode=mode, budget=dataclasses.replace(BUDGET, **budget), router_documents=2)
    answer, heard, state = engine().tell(sum(turns, []), config, namespaces=namespaces, changes=changes)
    return answer, state


def spelt(tokens):
    return renderer().tokenizer.decode(tokens)


def kinds(answer):
    return [[(e.kind, e.number) for e in one.events] for one in answer.rounds]


CHAINS = {
    "one document": ([names(7), END, ANSWER], {}, [7], [[("read", 7)], []]),
    "two rounds": ([names(7), names(4), END, ANSWER], {}, [7, 4], [[("read", 7)], [("read", 4)], []]),
    "two of one turn": ([names(4, 9), END, ANSWER], {}, [4, 9], [[("read", 4), ("read", 9)], []]),
    "unknown": ([names(5), ANSWER], {}, [], [[("unknown", 5)]]),
    "unknown among others": ([names(5, 4), END, ANSWER], {}, [4], [[("unknown", 5), ("read", 4)], []]),
    "repeated": ([names(4), names(4), ANSWER], {}, [4], [[("read", 4)], [("repeated", 4)]]),
    "repeated in one turn": ([names(4, 4), END, ANSWER], {}, [4], [[("read", 4), ("repeated", 4)], []]),
    "no number": ([LONG[:3] + REFERENCE_END, ANSWER], {}, [], [[("malformed", None)]]),
    "the end instead": ([LONG[:3] + ANSWER[-1:], ANSWER], {}, [], [[("malformed", None)]]),
    "endless": ([LONG, ANSWER], dict(turn_tokens=9), [], [[("malformed", None)]]),
    "a number without end": ([names(4)[:-1] + LONG, ANSWER], dict(turn_tokens=13), [], [[("malformed", None)]]),
    "malformed later": ([names(4), LONG, ANSWER], dict(turn_tokens=9), [4], [[("read", 4)], [("malformed", None)]]),
    "none named": ([END, ANSWER], {}, [], [[("none_named", None)]]),
    "documents spent": (
        [names(4, 7, 9), ANSWER], dict(documents=2), [4, 7],
        [[("read", 4), ("read", 7), ("documents_spent", 9)], []],
    ),
    "documents spent later": (
        [names(4), names(7), ANSWER], dict(documents=1), [4], [[("read", 4)], [("documents_spent", 7)]],
    ),
    "rounds spent": ([names(4), ANSWER], dict(rounds=1), [4], [[("read", 4), ("rounds_spent", None)], []]),
    "cut": ([names(4), END, ANSWER], dict(document_tokens=3), [4], [[("cut", 4)], []]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("changes", [(), (True, False, True)], ids=["", "changed"])
def test_a_chain(name, changes):
    turns, budget, numbers, events = CHAINS[name]
    answer, state = tell(*turns, changes=changes, **budget)
    assert (answer.text, answer.outcome) == ("north", "answered")
    assert [c.number for c in answer.citations] == numbers
    assert kinds(answer) == events
    # The closing comes once, and the question before it is repeated.
    assert state.tokens.count(END[0]) == 1
    assert spelt(state.tokens).count(Q) == 2
    assert state.tokens[-len(ANSWER) :] == ANSWER
    restated = renderer().restated(Q)
    assert state.tokens[-len(ANSWER) - len(restated) : -len(ANSWER)] == restated
    for citation in answer.citations:
        document = DOCUMENTS[citation.number]
        assert (citation.id, citation.title) == (document.id, document.title)
        assert citation.namespace == ("few" if citation.number in FEW else "rest")
        cut = ("cut", citation.number) in sum(events, [])
        assert citation.cut == cut == (citation.text != document.text)
        assert spelt(state.tokens).count(citation.text) == 1
    assert answer.prompt_tokens + answer.completion_tokens >= len(state.tokens)


def test_what_routes_in_each_round():
    _, state = tell(names(7), names(4, 9), END, ANSWER)
    asked, first, second, _ = engine().turns
    question, body = renderer().prompt(Q)[0], lambda n: renderer().whole_body(DOCUMENTS[n])
    text = lambda n: renderer().appended_body(body(n), n)  # noqa: E731
    assert question[: len(asked.routed)] == asked.routed and spelt(asked.routed).strip() == Q
    # Of what is new the texts route, not the names before them.
    assert (first.routed, second.routed) == (text(7), text(4) + text(9))
    assert first.tokens == names(7)[-1:] + text(7)
    routed = [token for token, routes in zip(state.tokens, state.routing, strict=True) if routes]
    assert routed == asked.routed + second.routed


def test_when_all_is_computed_anew_the_question_routes_with_the_newest_text():
    answer, _ = tell(names(7), names(4), END, ANSWER, changes=[False, True])
    asked, first, tried, again, _ = engine().turns
    assert (first.fresh, tried.fresh, again.fresh, again.begin) == (False, False, True, 0)
    assert tried.tokens == again.tokens[tried.begin :]
    assert again.routed == asked.routed + tried.routed
    assert [r.computed for r in answer.rounds] == ["all", "new", "all"]
    assert [r.tokens for r in answer.rounds] == [len(t.tokens) for t in (asked, first, again)]
    assert [r.why for r in answer.rounds] == ["", "", "router layer 1 selects other documents than before"]
    assert [r.written for r in answer.rounds] == [spelt(names(7)), spelt(names(4)), spelt(END)]


@pytest.mark.parametrize("space, other", [("few", 9), ("rest", 4)])
def test_a_document_of_another_namespace_is_unknown(space, other):
    answer, state = tell(names(other), ANSWER, namespaces=[space])
    assert kinds(answer) == [[("unknown", other)]] and answer.citations == ()
    assert TEXTS[other] not in spelt(state.tokens)
    seen = [n for n in TEXTS if (n in FEW) == (space == "few")]
    assert {n for r in answer.rounds for n in r.documents.flat} <= {-1, *seen}
    none, _ = tell(names(4), ANSWER, namespaces=[])
    assert kinds(none) == [[("unknown", 4)]] and none.score is None


def test_the_router_chooses():
    # Means over layers: 0.2, 0.6, 0.3, -0.3, 0.2.
    answer, state = tell(ANSWER, mode="router")
    assert [c.number for c in answer.citations] == [7, 9]
    assert [c.score for c in answer.citations] == pytest.approx(SCORES.mean(axis=0)[1:3])
    assert answer.score == answer.citations[0].score and answer.text == "north"
    assert kinds(answer) == [[("read", 7), ("read", 9)]]
    for number in (7, 9):
        text = names(number) + renderer().appended_body(renderer().whole_body(DOCUMENTS[number]), number)
        assert spelt(text) in spelt(state.tokens)
    (asked, texts) = engine().turns
    assert texts.routed is None and not texts.fresh
    assert [c.number for c in tell(ANSWER, mode="router", namespaces=["rest"])[0].citations] == [9, 30]
    assert [c.number for c in tell(ANSWER, mode="router", documents=1)[0].citations] == [7]
    assert tell(ANSWER, mode="router", namespaces=[])[0].citations == ()


def test_latent_reads_no_text():
    answer, state = tell(ANSWER, mode="latent")
    (asked,) = engine().turns
    assert (answer.text, answer.citations, kinds(answer)) == ("north", (), [[]])
    assert spelt(asked.routed).strip() == Q and asked.tokens == state.tokens[: -len(ANSWER)]


@pytest.mark.parametrize("below, outcome", [(0.59, "answered"), (0.6, "answered"), (0.61, "not_in_memory")])
@pytest.mark.parametrize("mode", MODES)
def test_abstaining(mode, below, outcome):
    best = float(SCORES.mean(axis=0)[1])
    turns = ANSWER if mode in ("router", "latent") else END + ANSWER
    config = AskConfig(mode=mode, budget=BUDGET, abstain_below=best if below == 0.6 else below)
    answer, heard, _ = engine().tell(turns, config)
    assert (answer.outcome, answer.score) == (outcome, pytest.approx(best))
    if outcome == "not_in_memory":
        assert answer.text == renderer().tokenizer.template.not_found == heard[0].text
        assert (answer.completion_tokens, answer.citations, len(answer.rounds)) == (0, (), 1)


def test_no_room():
    small, budget = Dictated(context=44), Budget(answer_tokens=3, turn_tokens=9)
    answer, _, state = small.tell(names(4) + names(7) + ANSWER, AskConfig(budget=budget))
    assert [[k for k, _ in one] for one in kinds(answer)] == [["cut", "no_room"], []]
    assert TEXTS[4].startswith(answer.citations[0].text) and 0 < answer.citations[0].tokens < 11
    assert len(state.tokens) <= 44
    tiny, _, _ = Dictated(context=30).tell(names(4) + ANSWER, AskConfig(budget=budget))
    assert kinds(tiny) == [[("no_room", 4)]] and tiny.citations == ()
    router = AskConfig(mode="router", router_documents=3, budget=budget)
    answer, _, _ = small.tell(ANSWER, router)
    assert kinds(answer) == [[("read", 7), ("no_room", 9)]]


PIECES = [names(n)[:-1] for n in (*TEXTS, 5)]
PIECES += [REFERENCE_END, END, ANSWER[-1:], ANSWER[:-1], LONG[:2], [0], names(4)[1:3]]
budgets = st.builds(
    Budget, rounds=st.integers(1, 3), documents=st.integers(1, 3), turn_tokens=st.integers(1, 12),
    document_tokens=st.sampled_from([None, 1, 4]), answer_tokens=st.integers(1, 8),
)  # fmt: skip


@settings(max_examples=150)
@given(
    steps=st.sampled_from([1, 3]),
    script=st.lists(st.sampled_from(PIECES), max_size=12),
    budget=budgets,
    mode=st.sampled_from(["generate", "constrained", "router", "latent"]),
    namespaces=st.sampled_from([None, (), ("few",), ("rest",)]),
    changes=st.lists(st.booleans(), max_size=4),
)
def test_whatever_is_written(steps, script, budget, mode, namespaces, changes):
    config = AskConfig(mode=mode, budget=budget, router_documents=3)
    answer, heard, state = engine(steps, CONTEXT).tell(sum(script, []), config, changes=changes, namespaces=namespaces)
    assert answer.outcome in ("answered", "cut") and 0 < answer.completion_tokens
    numbers, events = [c.number for c in answer.citations], answer.events
    assert len(set(numbers)) == len(numbers) <= budget.documents
    assert [e.number for e in events if e.kind in ("read", "cut")] == numbers
    assert [c.cut for c in answer.citations] == [e.kind == "cut" for e in events if e.kind in ("read", "cut")]
    assert all(c.tokens <= (budget.document_tokens or CONTEXT) for c in answer.citations)
    assert all(namespaces is None or c.namespace in namespaces for c in answer.citations)
    assert 1 <= len(answer.rounds) <= budget.rounds + 1
    turns = len([r for r in answer.rounds if r.written])
    assert answer.completion_tokens <= turns * budget.turn_tokens + budget.answer_tokens
    last = state.tokens[-1]
    assert (answer.outcome == "answered") == (last == ANSWER[-1])
    assert answer.outcome == "answered" or last in (*REFERENCE_END, *END) or state.left == 0
    assert len(state.tokens) <= CONTEXT
    hidden = [n for n in TEXTS if namespaces is not None and ("few" if n in FEW else "rest") not in namespaces]
    assert not any(TEXTS[n] in spelt(state.tokens) for n in hidden if n != 12)  # 12 is part of other texts
    assert spelt(state.tokens).count(Q) == 2
    # Of the last round the trace tells why retrieval ended there, but where the model ended it in good order.
    if mode in ("generate", "constrained") and answer.rounds[-1].events:
        assert answer.rounds[-1].events[-1].kind not in ("read", "cut")
    assert [e.citation for e in heard if e.citation] == list(answer.citations)
    assert "".join(e.text for e in heard) == answer.text
