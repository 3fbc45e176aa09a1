"""`python -m msa_jax.ask`: flags, output, exit status; on a session that does what a script says."""

import dataclasses
import io
import json
import math
import sys
import typing

import pytest

from msa_jax.ask import __main__ as command
from msa_jax.ask import show
from msa_jax.inference.answer import Event, EventKind
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig, Sampling
from tests.ask import fake
from tests.ask.fake import BASE, run


def test_an_answer_and_its_documents_are_printed(session, capsys):
    assert run("where to") == 0
    assert capsys.readouterr().out.splitlines() == [
        "north, past 東京",
        "[1] The river · d4 · score 0.750",
        "    the river runs north",
        "[2] d9 · towns · not scored · first 5 tokens",
        "    seven towns seven towns seven towns seven towns seven t…",
    ]
    assert session.asked == [("where to", None, AskConfig())]
    assert session.closed and session.stream_closed and session.explained == []


def test_the_answer_is_flushed_piece_by_piece(session, monkeypatch):
    class Out(io.StringIO):
        seen = []

        def flush(self):
            self.seen.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Out())
    assert run("where to") == 0
    assert Out.seen[:3] == ["nor", "north,", "north, pa"]


def test_flags_become_settings(session):
    flags = (
        "--mode router --namespace a --namespace b --stop . --stop end --router_documents 3 --abstain_below 0.25 "
        "--timeout 9 --temperature 0.5 --top_p 0.75 --top_k 7 --seed 11 --rounds 2 --documents 5 --document_tokens 99 "
        "--turn_tokens 12 --answer_tokens 34"
    )
    assert run("q", *flags.split()) == 0
    wanted = AskConfig(
        mode="router",
        sampling=Sampling(temperature=0.5, top_p=0.75, top_k=7, seed=11),
        budget=Budget(rounds=2, documents=5, document_tokens=99, turn_tokens=12, answer_tokens=34),
        router_documents=3, stop=(".", "end"), abstain_below=0.25, timeout=9,
    )  # fmt: skip
    assert session.asked == [("q", ["a", "b"], wanted)]


def test_shapes_are_flags_and_long_contexts_get_more_lengths():
    options = command.parser().parse_args([*BASE, "q", "--slots", "3", "--context", "5000"])
    engine = command.settings(options)[1]
    assert (engine.slots, engine.context) == (3, 5000)
    assert engine.lengths == (*EngineConfig().lengths, 1024, 2048, 4096, 5000)
    options = command.parser().parse_args([*BASE, "q"])
    assert command.settings(options) == (AskConfig(), EngineConfig())


@pytest.mark.parametrize(
    "outcome, status, note",
    [
        (fake.NOT_FOUND, 3, "The memory holds no answer.\n"),
        (dict(outcome="timed_out", text="nor", citations=()), 1, "nor\n(given up when its time ran out: raise --time"),
        (dict(outcome="cut", citations=()), 0, "(the tokens that it may have ran out here"),
    ],
)  # fmt: skip
def test_outcomes_have_a_status(session, capsys, outcome, status, note):
    session.answers["q"] = fake.answer("q", **outcome)
    assert run("q") == status
    assert note in capsys.readouterr().out


def test_what_went_wrong_on_the_way_is_told(session, capsys):
    kinds = ("unknown", "none_named", "no_room", "documents_spent", "rounds_spent", "read", "cut", "repeated")
    made = dataclasses.replace(fake.ROUND, events=tuple(Event(kind, 12) for kind in kinds))
    session.answers["q"] = fake.answer("q", rounds=(made, made), citations=())
    assert run("q") == 0
    said = capsys.readouterr().out.splitlines()[1:]
    assert len(said) == 10 and said[:5] == said[5:]
    assert said[0] == "(the model named 12, a number that no document has which it may read)"


def test_every_kind_of_event_is_told_or_shown_otherwise():
    assert set(show._EVENTS) | {"read", "cut", "repeated"} == set(typing.get_args(EventKind))


def test_json_is_one_object(session, capsys):
    assert run("where to", "--json", "--explain", "--namespace", "towns") == 0
    (line,) = capsys.readouterr().out.splitlines()
    value = json.loads(line, parse_constant=pytest.fail)
    assert value.pop("explanation")[0]["layers"][1] == {
        "layer": 3, "score": 0.5, "rank": 12, "chunk": 1, "passage": "grey lake", "token": "lake",
    }  # fmt: skip
    citations = value.pop("citations")
    assert citations[0] == {
        "number": 4, "id": "d4", "title": "The river", "namespace": "default", "text": "the river\nruns north",
        "tokens": 7, "cut": False, "score": 0.75,
    }  # fmt: skip
    assert citations[1]["score"] is None
    assert value == {
        "question": "where to", "answer": "north, past 東京", "outcome": "answered", "score": 0.5,
        "rounds": [{
            "documents": [[[4, 0.75], [9, 0.5]], [[9, 0.25]]],
            "events": [
                {"kind": "read", "number": 4}, {"kind": "cut", "number": 9}, {"kind": "repeated", "number": None},
            ],
            "written": "[4][9]", "computed": "all", "why": "", "tokens": 31,
        }],
        "prompt_tokens": 40, "completion_tokens": 9, "seconds": {"waited": 0.25, "first_token": 0.5, "total": 1.5},
    }  # fmt: skip
    assert session.explained == [("where to", ["towns"])]


def test_json_has_no_nan(session, capsys):
    session.answers["q"] = fake.answer("q", score=math.nan)
    assert run("q", "--json") == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["score"] is None


def test_explaining_names_layers_passages_and_tokens(session, capsys):
    assert run("where to", "--explain") == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "1. The river · d4 · score 0.688",
        "    layer 2: 0.875, rank 1, by 'river': the river runs\ufffd[2J…",
        "    layer 3: 0.500, rank 12, by 'lake': grey lake",
    ]


def test_a_document_cannot_steer_the_terminal(session, capsys):
    evil = fake.CITATIONS[0].__class__(1, "d\x1b[31m", "t\x07", "default", "a\x1b]0;title\x07\nb\ud800", 3)
    session.answers["q"] = fake.answer("q", text="x\x1b[2J\x9b1m", citations=(evil,))
    assert run("q") == 0
    out = capsys.readouterr().out
    assert not any(c < " " and c != "\n" or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" for c in out)
    assert "a\ufffd]0;title\ufffd b\ufffd" in out


def test_lines_fit_the_terminal(session, capsys, monkeypatch):
    shorten = show.shorten
    assert shorten("東京東京", 8) == "東京東京"
    assert shorten("東京東京", 7) == "東京東…"
    assert shorten("東京東京", 6) == "東京…"
    assert shorten("abc def", 7) == "abc def"
    assert shorten("abc def", 6) == "abc d…"
    assert shorten("abc def", 5) == "abc…"
    monkeypatch.setenv("COLUMNS", "31")
    assert run("q") == 0
    assert all(len(line) <= 31 for line in capsys.readouterr().out.splitlines()[1:])


def test_an_interrupted_stream_is_closed(session, capsys):
    session.answers["q"] = KeyboardInterrupt()
    assert run("q") == 130
    assert capsys.readouterr().out == "nor"
    assert session.stream_closed and session.closed


def test_a_refused_question_is_one_sentence(session, capsys):
    assert run("refuse this") == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "ask: the question 'refuse this' is refused.\n")
