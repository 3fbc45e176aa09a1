"""Clients that go away: their questions are cancelled, and those of others are not."""

import contextlib
import dataclasses
import json
import socket
import time

import httpx
import pytest

from msa_jax.serve import questions
from tests.serve.fakes import FakeSession, events_of, eventually, serving

SLOW = ["first ", *[0.05, "more "] * 200]


def script(question):
    return SLOW if question == "slow" else [30.0] if question == "mute" else [f"{word} " for word in question.split()]


@pytest.fixture(scope="module")
def server():
    with serving(FakeSession(slots=8, script=script)) as served:
        yield served


def body(text, **more):
    return {"messages": [{"role": "user", "content": text}]} | more


def cancelled(server):
    pending = server.session.submitted[-1]
    return eventually(pending.cancelled.is_set, 3) and eventually(pending.done)


def test_in_the_middle_of_a_stream(server):
    client = server.openai()
    with client.chat.completions.create(model="fake", **body("slow"), stream=True) as stream:
        pieces = [chunk.choices[0].delta.content for _, chunk in zip(range(4), stream, strict=False)]
    assert pieces == ["", "first ", "more ", "more "]
    assert cancelled(server)
    assert eventually(lambda: server.metric("msa_requests_total", status="499") == 1)
    assert eventually(lambda: server.metric("msa_questions_total", outcome="cancelled") == 1)


def test_before_a_stream_says_anything(server):
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body("mute", stream=True)) as response:
        assert response.status_code == 200
    assert cancelled(server)


def test_before_the_answer(server):
    before = len(server.session.submitted)
    with server.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=body("mute"), timeout=0.3)
    assert len(server.session.submitted) == before + 1 and cancelled(server)


def raw_request(server, text, **more):
    payload = json.dumps(body(text, **more)).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + payload)
    return connection


@pytest.mark.parametrize("reset", [False, True])
def test_closed_or_reset(server, reset):
    before = len(server.session.submitted)
    with contextlib.closing(raw_request(server, "mute")) as connection:
        assert eventually(lambda: len(server.session.submitted) == before + 1)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert cancelled(server)


def test_in_the_middle_of_the_body(server):
    before = len(server.session.submitted)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
                           b"Content-Type: application/json\r\n\r\n{")  # fmt: skip
        time.sleep(0.05)
    assert eventually(lambda: server.service.requests.taken == 0, 3)  # long before the time for a body is over
    assert len(server.session.submitted) == before


def test_others_are_answered_meanwhile(server):
    gone = [raw_request(server, "slow", stream=bool(i % 2)) for i in range(6)]
    stays = server.openai().chat.completions.create(model="fake", **body("a b c"), stream=True)
    first = next(stays)
    for connection in gone:
        connection.close()
    rest = "".join(chunk.choices[0].delta.content or "" for chunk in stays)
    assert first.choices[0].delta.content + rest == "a b c "
    slow = [p for p in server.session.submitted if p.question == "slow"][-6:]
    assert all(eventually(p.cancelled.is_set, 3) for p in slow)


def test_a_client_that_stops_reading(monkeypatch):
    monkeypatch.setattr(questions, "_SEND_SECONDS", 0.3)
    with serving(FakeSession(script=lambda _: [*["x" * 100_000] * 300, 30.0])) as server:
        with contextlib.closing(raw_request(server, "long", stream=True)) as connection:
            connection.recv(10)
            assert eventually(lambda: server.session.submitted[-1].cancelled.is_set(), 5)
            assert server.chat("a", msa={"timeout": 0.1}).status_code == 200


def test_a_stream_without_news_sends_comments(monkeypatch):
    monkeypatch.setattr(questions, "_ALIVE_SECONDS", 0.1)
    with serving(FakeSession(script=lambda _: [0.5, "a"])) as server:
        text = server.chat("a", stream=True).text
        assert text.count(": waiting\n\n") >= 2 and [e["choices"][0]["delta"] for e in events_of(text)][1] == {
            "content": "a"
        }


class Stubborn(FakeSession):
    """Ends a question only when the test says so."""

    def submit(self, question, *, config, **kwargs):
        pending = super().submit(question, config=dataclasses.replace(config, timeout=None), **kwargs)
        self.let_go, pending.cancel = pending.cancel, lambda: None
        return pending


def test_an_engine_that_owes_the_outcome_for_too_long(monkeypatch):
    monkeypatch.setattr(questions, "_LATE_SECONDS", 0.3)
    monkeypatch.setattr(questions, "_LOOK_SECONDS", 0.1)
    with serving(Stubborn(script=lambda _: [30.0])) as server:
        response = server.chat("a", msa={"timeout": 0.1})
        assert response.status_code == 504 and "the engine does not answer" in response.text
        server.session.let_go()


def test_a_place_is_taken_until_the_session_lets_go():
    """Else clients that ask and leave could fill the engine with questions that nobody counts."""

    with serving(Stubborn(script=lambda _: [30.0])) as server:
        raw_request(server, "mute").close()
        assert eventually(lambda: server.session.submitted and server.service.requests.taken == 0)
        time.sleep(0.3)
        assert server.service.questions.taken == 1
        server.session.let_go()
        assert eventually(lambda: server.service.questions.taken == 0)
