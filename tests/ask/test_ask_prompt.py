"""The prompt of `python -m msa_jax.ask --interactive`."""

import io

import pytest

from msa_jax.ask import __main__ as command
from msa_jax.ask.prompt import HELP, Prompt
from msa_jax.inference.settings import AskConfig
from tests.ask import fake


def talk(*typed, session=None, namespaces=None):
    session, out = session or fake.Session(), io.StringIO()
    with fake.lines(*typed) as read:
        Prompt(session, AskConfig(), namespaces, read=read, out=out).run()
    assert out.getvalue().startswith(HELP)
    return session, out.getvalue().removeprefix(HELP)


def test_questions_are_answered_until_the_input_ends():
    session, out = talk("where to", "", "   ", "and then")
    assert [q for q, *_ in session.asked] == ["where to", "and then"]
    assert out.count("north, past 東京\n[1] The river") == 2
    assert out.endswith("\n\n")


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_quit_ends(word):
    session, out = talk(word)
    assert (session.asked, out) == ([], "")


def test_commands_change_how_the_next_is_asked():
    session, out = talk(
        "/namespaces", "/namespaces a b", "one", "/namespaces", "/mode", "/mode latent", "two", "/namespaces *", "three"
    )
    asked = [(question, namespaces, config.mode) for question, namespaces, config in session.asked]
    assert asked == [("one", ("a", "b"), "generate"), ("two", ("a", "b"), "latent"), ("three", None, "latent")]
    said = [line for line in out.splitlines() if line and line[:2] not in ("no", "[1", "[2", "  ")]
    some, everything = "read: a, b; not read: towns", "read: a, b, towns"
    assert said == [everything, some, some, "generate", "latent", everything]


def test_explain_takes_a_question_or_the_last():
    session, out = talk("/explain", "where to", "/explain", "/namespaces a", "/explain why not")
    assert session.explained == [("where to", None), ("why not", ("a",))]
    assert out.startswith("Ask something first")
    assert out.count("1. The river · d4 · score 0.688") == 2
    assert [q for q, *_ in session.asked] == ["where to"]


@pytest.mark.parametrize(
    "line, said",
    [
        ("/modes", "There is no command /modes"),
        ("/mode guess", "There is no mode guess"),
        ("/namespaces a c", "There is no namespace c; there are a, b, towns."),
    ],
)
def test_wrong_commands_are_told(line, said):
    session, out = talk(line, "/mode", "fine")
    assert out.startswith(said) and "\ngenerate\n" in out
    ((_, namespaces, _),) = session.asked
    assert namespaces is None


def test_help_is_shown():
    assert talk("/help")[1].startswith(HELP)


def test_a_refused_question_does_not_end_it():
    session, out = talk("refuse this", "fine")
    assert out.startswith("the question 'refuse this' is refused.\n")
    assert [q for q, *_ in session.asked] == ["fine"]


def test_an_interruption_ends_the_answer_and_not_the_program():
    session = fake.Session({"long": KeyboardInterrupt()})
    _, out = talk("long", KeyboardInterrupt(), "fine", session=session)
    assert session.stream_closed
    assert out.startswith("nor\n(given up)\n\nnorth, past 東京")
    assert [q for q, *_ in session.asked] == ["long", "fine"]


def test_an_interruption_while_it_is_shown_gives_the_question_up():
    class Out(io.StringIO):
        def write(self, text):
            if text == "nor":
                raise KeyboardInterrupt
            return super().write(text)

    session, out = fake.Session(), Out()
    with fake.lines("where to") as read:
        Prompt(session, AskConfig(), None, read=read, out=out).run()
    assert session.stream_closed
    assert out.getvalue().endswith("\n(given up)\n\n")


def test_the_command_starts_it_with_its_flags(monkeypatch, capsys):
    session, typed = fake.Session(), ["one"]
    monkeypatch.setattr(command, "open_session", lambda *_: session)

    def read(prompt):
        if typed:
            return typed.pop()
        raise EOFError

    monkeypatch.setattr(Prompt.__init__, "__kwdefaults__", Prompt.__init__.__kwdefaults__ | {"read": read})
    flags = ["--workdir", "r", "--bank", "b", "--interactive", "--namespace", "a", "--temperature", "0.5"]
    assert command.main(flags) == 0
    ((question, namespaces, config),) = session.asked
    assert (question, namespaces, config.sampling.temperature) == ("one", ["a"], 0.5)
    assert session.closed
