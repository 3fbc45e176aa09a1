"""A server as a process: signals, the grace, what is refused before it starts."""

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from msa_jax.serve import __main__ as command
from msa_jax.serve.keys import add_key
from tests.serve.fakes import events_of, eventually


@contextlib.contextmanager
def started(root, *arguments, **environment):
    """The process and a client of it, once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.process", *map(str, arguments)],
        cwd=root, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            port = process.stdout.readline().strip()
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:

                def ready():
                    with contextlib.suppress(httpx.TransportError):
                        return http.get("/readyz").status_code == 200
                    return process.poll() is not None

                if "FAIL" not in environment:
                    assert eventually(ready, 20) and process.poll() is None
                yield process, http
        finally:
            process.kill()


def chat(http, text, **more):
    body = {"messages": [{"role": "user", "content": text}]} | more
    return http.post("/v1/chat/completions", json=body)


def runs(http, count):
    """Whether so many questions come to run."""
    return eventually(lambda: f"msa_questions_running {count}.0" in http.get("/metrics").text)


def refuses(url):
    """Whether nobody listens there."""
    try:
        httpx.get(f"{url}/healthz")
        return False
    except httpx.TransportError as e:
        return isinstance(e, httpx.ConnectError)


def test_keys_are_read_again_and_what_runs_ends_and_nothing_new_begins(root, tmp_path):
    file = str(tmp_path / "keys")
    first = add_key(file, "first", None, False)
    with started(root, 30, file) as (process, http), concurrent.futures.ThreadPoolExecutor(3) as pool:

        def status(key):
            http.headers["authorization"] = f"Bearer {key}"
            return http.get("/v1/models").status_code

        second = add_key(file, "second", None, False)
        assert (status(second), status(first)) == (401, 200)
        process.send_signal(signal.SIGHUP)
        assert eventually(lambda: status(second) == 200)
        (tmp_path / "keys").write_text("{")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert status(first) == 200

        running = [pool.submit(chat, http, "slow", stream=stream) for stream in (False, True)]
        assert runs(http, 2)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert eventually(lambda: refuses(http.base_url))
        assert running[0].result().json()["choices"][0]["message"]["content"] == "begun done"
        assert [e["choices"][0]["finish_reason"] for e in events_of(running[1].result().text)][-1] == "stop"
        assert process.wait(20) == 0 and time.monotonic() - begin < 20
        assert "ended" in process.stdout.read() and "the keys stay as they were" in process.stderr.read()


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)])
def test_what_does_not_end_in_time_is_cancelled(root, signals):
    """By the end of the grace, or by a second signal long before it; nor does a change of documents keep it."""
    grace = 0.5 if len(signals) == 1 else 100
    with started(root, grace, ADD="60") as (process, http), concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(chat, http, "endless", stream=stream) for stream in (False, True)]
        adding = pool.submit(http.post, "/v1/documents", json={"id": "a", "text": "b"})
        assert runs(http, 2)
        begin = time.monotonic()
        time.sleep(0.3)
        for one in signals:
            process.send_signal(one)
            time.sleep(0.3)
        whole, stream = (one.result() for one in running)
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "stopping")
        assert events_of(stream.text)[-1]["error"]["code"] == "stopping"
        assert adding.result().json()["error"]["code"] == "stopping"
        assert process.wait(20) == 0 and time.monotonic() - begin < 20


def test_what_cannot_be_loaded_ends_it(root):
    with started(root, 1, FAIL="1") as (process, _):
        assert process.wait(20) == 1 and "OSError: cannot be loaded" in process.stderr.read()


MODEL = ["--workdir", "none", "--bank", "none"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "give --keys or --open"),
        (["--host", "example.org"], "give --keys or --open"),
        (["--keys", "none/keys"], "none/keys: No such file"),
        (["--timeout", "0"], "timeout must be above 0"),
        (["--max_body", "0"], "body must be at least 1"),
        (["--slots", "0"], "slots must be an integer of at least 1"),
        (["--temperature", "-1"], "temperature must be"),
        (["--port", "99999"], "from 0 to 65535"),
        (["--host", "203.0.113.7", "--open"], "cannot listen there"),
    ],
)
def test_flags_that_make_no_sense(capsys, arguments, said):
    assert command.main([*MODEL, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("serve: ") and said in error and error.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert command.main([*MODEL, "--port", str(other.getsockname()[1])]) == 1
    assert "choose another one" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--bank", "b"], ["--workdir", "a"], [*MODEL, "--mode", "best"], ["--help"]])
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == (0 if arguments == ["--help"] else 2)


@pytest.mark.parametrize(("host", "local"), [("::1", True), ("127.9.9.9", True), ("localhost", True), ("::", False)])
def test_loopback(host, local):
    assert command.is_loopback(host) is local
