"""What is too much, too slow or no request at all, over raw sockets; and what waits."""

import concurrent.futures
import json
import socket
import threading
import time

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax.errors import ConfigError
from msa_jax.inference.settings import AskConfig
from msa_jax.serve.chat import ChatRequest, read_chat
from msa_jax.serve.errors import ApiError
from msa_jax.serve.limits import Limits, parse_json
from tests.serve.fakes import FakeSession, eventually, serving

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode()


@pytest.fixture(scope="module")
def server():
    with serving(limits=Limits(body=2000, body_seconds=0.5, grace=0.2)) as served:
        yield served


def connect(server):
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def received(connection) -> tuple[int, dict]:
    """Status and JSON of a response, after which the server closes the connection."""
    raw = b""
    while piece := connection.recv(1 << 16):
        raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_long_body_that_says_so_is_refused_before_it_is_read(server):
    with connect(server) as connection:
        connection.sendall(f"{HEAD}Expect: 100-continue\r\nContent-Length: {10**15}\r\n\r\n".encode())
        status, body = received(connection)
    assert (status, body["error"]["code"]) == (413, "body_too_large") and "2,000 bytes" in body["error"]["message"]


def test_a_length_of_thousands_of_digits(server):
    with connect(server) as connection:
        connection.sendall(f"{HEAD}Expect: 100-continue\r\nContent-Length: {'9' * 5000}\r\n\r\n".encode())
        assert connection.recv(100).split()[1] in (b"400", b"413")


def test_a_long_body_that_does_not_say_so_is_refused_when_it_is_too_long(server):
    with connect(server) as connection:
        connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent, begin = 0, time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begin < 30:  # it never ends by itself
                connection.sendall(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
                sent += 0x2000
        assert sent < 1 << 26
    with server.http() as http:
        done = http.post(
            "/v1/chat/completions", content=(b" " * 999 for _ in range(9)), headers={"content-type": "application/json"}
        )
        assert (done.status_code, done.json()["error"]["code"]) == (413, "body_too_large")
        assert http.get("/healthz").status_code == 200


def test_a_client_in_the_middle_of_a_long_body_reads_the_refusal(server):
    with pytest.raises(openai.APIStatusError) as caught:
        server.openai().chat.completions.create(model="fake", messages=[{"role": "user", "content": "a" * 3_000_000}])
    assert caught.value.status_code == 413


def test_a_client_that_reads_only_when_it_has_sent_all(server):
    with connect(server) as connection:
        connection.sendall(f"{HEAD}Content-Length: 8000000\r\n\r\n".encode())
        time.sleep(0.1)  # the refusal is out
        connection.sendall(b" " * 8_000_000)
        assert received(connection)[0] == 413


def test_a_body_of_just_the_limit_is_taken(server):
    raw = BODY + b" " * (2000 - len(BODY))
    with server.http() as http:
        post = {"url": "/v1/chat/completions", "headers": {"content-type": "application/json"}}
        assert http.post(**post, content=raw).status_code == 200
        assert http.post(**post, content=raw + b" ").status_code == 413


def test_a_body_that_does_not_come(server):
    with connect(server) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        status, body = received(connection)
    assert status == 408 and "0.5 s" in body["error"]["message"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"messages": NaN}', "not valid JSON: expected value at line 1 column 14"),
        (b'{"messages": "\xff"}', "not valid JSON: invalid unicode"),
        (b'{"messages": "\\ud800"}', "not valid JSON: unexpected end of hex escape"),
        (b'{"messages": ' + b"9" * 1900 + b"}", "messages must be a valid list"),
        (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}', "temperature must be a finite"),
        (b"[" * 1999, "recursion limit exceeded"),
        (b"[1]", "The body must be a JSON object"),
        (b"null", "The body must be a JSON object"),
        (b'"a"', "The body must be a JSON object"),
        (b'{"msa": [], "messages": [{"role": "user", "content": "a"}]}', "msa must be a JSON object"),
    ],
)
def test_what_is_no_request(server, raw, said):
    with server.http() as http:
        response = http.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400 and said in response.json()["error"]["message"]


def test_nesting_without_end():
    for raw in (b"[" * 10**6, b'{"a":' * 10**6):
        with pytest.raises(ApiError, match="recursion limit exceeded"):
            parse_json(raw)
    with pytest.raises(ApiError, match="not valid JSON"):
        parse_json(b"9" * 10**5)


def test_nesting_that_can_just_be_read(server):
    for depth in (5, 90, 400, 900):
        response = server.chat("a", stop=json.loads("[" * depth + "]" * depth))
        assert response.status_code == 400 and ("stop[0] must be" in response.text or "limit exceeded" in response.text)


def test_a_body_not_called_json(server):
    """Browsers send forms to any site; with JSON they would ask first."""
    with server.http() as http:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            response = http.post("/v1/chat/completions", content=BODY, headers={"content-type": kind})
            assert response.status_code == 415
        kind = {"content-type": "Application/JSON; charset=utf-8"}
        assert http.post("/v1/chat/completions", content=BODY, headers=kind).status_code == 200


def test_what_is_not_http(server):
    for raw in (b"\x16\x03\x01" * 50 + b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20000):
        with connect(server) as connection:
            connection.sendall(raw)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_names_that_lead_here_from_elsewhere(server):
    with server.http() as http:
        for host, status in [
            ("evil.example", 403),
            ("127.0.0.1.evil.example", 403),
            ("localhost:9", 200),
            ("[::1]", 200),
        ]:
            assert http.get("/v1/models", headers={"host": host}).status_code == status
    with serving(local=False) as open_to_all, open_to_all.http() as http:
        assert http.get("/v1/models", headers={"host": "msa.example"}).status_code == 200


def test_more_questions_than_may_wait():
    go = threading.Event()
    with serving(FakeSession(slots=2, script=lambda _: ["a", go]), limits=Limits(waiting=3, grace=0.2)) as server:
        with concurrent.futures.ThreadPoolExecutor(5) as pool, server.http() as http:
            running = [pool.submit(server.chat, "a") for _ in range(5)]
            assert eventually(lambda: server.service.questions.taken == 5)
            for refused in (server.chat("a"), http.post("/v1/explain", json={"question": "a"})):
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                assert refused.json()["error"]["type"] == "rate_limit_error"
            go.set()
            assert [one.result().status_code for one in running] == [200] * 5
            assert http.post("/v1/explain", json={"question": "a"}).status_code == 200
        assert server.chat("a").status_code == 200


def test_openais_client_waits_and_asks_again():
    with serving(FakeSession(slots=1, script=lambda _: [0.1, "a"]), limits=Limits(waiting=0, grace=0.2)) as server:
        messages = [{"role": "user", "content": "a"}]
        client = server.openai(max_retries=9)

        def ask(_):
            return client.chat.completions.create(model="fake", messages=messages).choices[0].message.content

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            assert list(pool.map(ask, range(3))) == ["a"] * 3


def test_more_requests_than_are_served_at_once():
    go = threading.Event()
    with serving(FakeSession(slots=9, script=lambda _: [go, "a"]), limits=Limits(requests=2, grace=0.2)) as server:
        with concurrent.futures.ThreadPoolExecutor(2) as pool, server.http() as http:
            running = [pool.submit(server.chat, "a") for _ in range(2)]
            assert eventually(lambda: server.service.requests.taken == 2)
            assert http.get("/v1/models").status_code == 429
            assert http.get("/healthz").status_code == http.get("/readyz").status_code == 200
            go.set()
            assert [one.result().status_code for one in running] == [200, 200]


@pytest.mark.parametrize(
    "bad", [{"body": 0}, {"timeout": 0}, {"grace": -1}, {"waiting": -1}, {"timeout": float("nan")}]
)
def test_limits_that_make_no_sense(bad):
    with pytest.raises(ConfigError, match=f"Limits: {next(iter(bad))} must be"):
        Limits(**bad)


SCALARS = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2)
)
NAMES = (
    "model stream stream_options temperature top_p max_tokens max_completion_tokens seed stop n tools logprobs user"
).split()
OWN = "mode rounds documents router_documents abstain_below namespaces top_k timeout".split()
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": VALUES}), max_size=2)


@settings(max_examples=200)
@given(
    body=VALUES
    | st.fixed_dictionaries(
        {"messages": VALUES | MESSAGES | st.just([{"role": "user", "content": "a"}])},
        optional={name: VALUES for name in NAMES} | {"msa": st.dictionaries(st.sampled_from(OWN), VALUES) | VALUES},
    )
)
def test_whatever_is_asked_is_understood_or_refused(body):
    try:
        request = read_chat(body, model="fake", defaults=AskConfig(), timeout=60.0)
    except ApiError as e:
        assert e.status in (400, 404) and e.message and len(e.message) < 500
    else:
        assert isinstance(request, ChatRequest) and 0 < request.config.timeout <= 60
        assert body["messages"][-1]["role"] == "user" and isinstance(request.question, str)
