"""The command that serves, as a process of its own with a real model and bank."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.serve.fakes import eventually
from tests.serve.test_contract import ROUTER, cited


@pytest.mark.slow
def test_the_command(root, places, tmp_path):
    """From the start of the process to its end: a minute of compiling."""
    arguments = f"--checkpoint {places[0]} --bank {places[1]} --port 0 --slots 1 --context 192 --model_name small"
    arguments += f" --compiled {tmp_path}/compiled"
    log = open(tmp_path / "log", "w+")
    with (
        log,
        subprocess.Popen(
            [sys.executable, "-m", "msa_jax.serve", "--compiled=", *arguments.split()],
            cwd=root, env=dict(os.environ), stderr=log,
        ) as process,
    ):
        try:

            def port():
                lines = (tmp_path / "log").read_text().splitlines()
                return next((int(line.rpartition(":")[2]) for line in lines if "listening on" in line), None)

            assert eventually(lambda: port() is not None, 60)
            with httpx.Client(base_url=f"http://127.0.0.1:{port()}", timeout=60) as http:
                assert http.get("/healthz").status_code == 200
                assert eventually(lambda: http.get("/readyz").status_code == 200, 120)
                body = {"model": "small", "messages": [{"role": "user", "content": "question"}], "max_tokens": 8}
                begin = time.monotonic()
                answer = http.post("/v1/chat/completions", json=body | {"msa": ROUTER})
                assert answer.status_code == 200 and len(cited(answer)) == 3
                assert time.monotonic() - begin < 5  # nothing is left to compile
                assert http.post("/v1/documents", json={"id": "x", "text": "y"}).status_code == 403
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
