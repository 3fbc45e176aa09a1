"""`python -m msa_jax.ask`: many questions at once, and what is refused before anything is opened."""

import io
import json
import os
import subprocess
import sys

import pytest

from msa_jax import MSATransformer
from msa_jax.ask import __main__ as command
from msa_jax.bank.manifest import BankSpec
from msa_jax.bank.store import MemoryStore
from tests.ask import fake
from tests.ask.fake import run

QUESTIONS = "first\n\n  second  \r\nrefuse me\nthird\n"


@pytest.mark.parametrize("stdin", [False, True])
def test_several_questions_are_asked_in_order(session, capsys, monkeypatch, tmp_path, stdin):
    session.answers["second"] = fake.answer("second", **fake.NOT_FOUND)
    (tmp_path / "q.txt").write_text(QUESTIONS)
    if stdin:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(QUESTIONS.encode())))
    assert run("--questions", "-" if stdin else str(tmp_path / "q.txt"), "--json") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["question"] for line in lines] == ["first", "second", "refuse me", "third"]
    assert lines[2] == {"question": "refuse me", "error": "the question 'refuse me' is refused."}
    assert [q for q, *_ in session.asked] == ["first", "second", "third"]


def test_several_questions_as_text(session, capsys, tmp_path):
    session.answers["b"] = fake.answer("b", **fake.NOT_FOUND)
    (tmp_path / "q.txt").write_text("a\nb\n")
    assert run("--questions", str(tmp_path / "q.txt"), "--explain", "--namespace", "towns", "--seed", "3") == 3
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["> a", "north, past 東京"]
    assert out[out.index("> b") + 1] == "The memory holds no answer."
    assert session.explained == [("a", ["towns"]), ("b", ["towns"])]
    assert [(q, names, config.sampling.seed) for q, names, config in session.asked] == [
        ("a", ["towns"], 3),
        ("b", ["towns"], 3),
    ]


def test_questions_are_handed_in_ahead_but_not_all_at_once(session, tmp_path, monkeypatch):
    handed, given = [], []
    submit = session.submit
    monkeypatch.setattr(session, "submit", lambda q, **more: handed.append(q) or submit(q, **more))
    monkeypatch.setattr(command, "as_json", lambda answer, _: given.append(len(handed)) or {})
    (tmp_path / "q.txt").write_text("".join(f"q{i}\n" for i in range(20)))
    assert run("--questions", str(tmp_path / "q.txt"), "--json", "--slots", "2") == 0
    assert given[:3] == [9, 10, 11] and given[-1] == 20


def test_an_interruption_gives_up_what_waits(session, capsys, tmp_path):
    session.answers["b"] = KeyboardInterrupt()
    (tmp_path / "q.txt").write_text("a\nb\nc\n")
    assert run("--questions", str(tmp_path / "q.txt"), "--json") == 130
    captured = capsys.readouterr()
    assert [json.loads(line)["question"] for line in captured.out.splitlines()] == ["a"]
    assert captured.err == "ask: interrupted.\n"
    assert len(session.cancelled) == 2 and session.closed


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give one of"),
        (["q", "--interactive"], "give one of"),
        (["q", "--questions", "f"], "give one of"),
        (["--interactive", "--json"], "--json is for questions"),
        (["q", "--temperature", "-1"], "temperature must be a number of at least 0, got -1.0"),
        (["q", "--temperature", "warm"], "invalid float value"),
        (["q", "--top_p", "0"], "top_p must be above 0"),
        (["q", "--top_k", "1.5"], "invalid int value"),
        (["q", "--rounds", "0"], "rounds must be an integer of at least 1"),
        (["q", "--document_tokens", "0"], "document_tokens must be"),
        (["q", "--abstain_below", "nan"], "abstain_below must be a number"),
        (["q", "--timeout", "0"], "timeout must be above 0"),
        (["q", "--stop", ""], "stop must be"),
        (["q", "--slots", "0"], "slots must be"),
        (["q", "--mode", "guess"], "invalid choice"),
        (["q", "--checkpoint", "x"], "not allowed with"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_opened(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_session", lambda *_: pytest.fail("opened"))
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, content, message",
    [
        (["  "], b"", "the command line: there is no question"),
        (["--questions", "FILE"], b"\n \n", "there is no question: give one"),
        (["--questions", "FILE"], b"good\n\xff\n", "line 2 is not UTF-8"),
        (["--questions", "nowhere.txt"], b"", "No such file"),
        (["a\udcff"], b"", "the question is not UTF-8"),
    ],
)
def test_bad_questions_are_refused_before_anything_is_opened(
    arguments, content, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(command, "open_session", lambda *_: pytest.fail("opened"))
    (tmp_path / "q.txt").write_bytes(content)
    assert run(*[str(tmp_path / "q.txt") if a == "FILE" else a for a in arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("ask: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bank", "nowhere", "--workdir", "RUN"], "nowhere: no bank here"),
        (["--bank", "nowhere", "--workdir", "RUN", "--namespace", "a"], "nowhere: no bank here"),
        (["--bank", "BANK", "--workdir", "RUN", "--namespace", "a"], "no namespace 'a': it has none yet."),
        (["--bank", "BANK", "--workdir", "nowhere"], "nowhere: no trained run there"),
        (["--bank", "BANK", "--checkpoint", "nowhere"], "nowhere: no such file"),
    ],
)
def test_what_is_not_there_is_refused_before_the_model_loads(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    MemoryStore.create("BANK", BankSpec("model", "text", 4, 1, 6, 2, 3, "float32")).close()
    monkeypatch.setattr(MSATransformer, "__init__", lambda *_, **__: pytest.fail("a model is made"))
    assert command.main([*arguments, "hi"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("streamed", [True, False])
def test_a_reader_that_goes_away_is_no_error(streamed):
    more = "" if streamed else ", outcome='not_in_memory', citations=()"
    script = (
        "import os, sys; from tests.ask import fake; from msa_jax.ask import __main__ as c;"
        f"c.open_session = lambda *_: fake.Session({{'q': fake.answer('q', text='x' * 3_000{more})}});"
        "sys.exit(c.main(['--workdir', 'r', '--bank', 'b', 'q']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
