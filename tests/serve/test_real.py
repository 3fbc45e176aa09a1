"""The server of a real session: a small model of random weights, a bank on disk."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
from flax import nnx

from msa_jax import MSAConfig, MSATransformer
from msa_jax.bank import BankDocument, BankSpec, DocumentEncoder, MemoryStore
from msa_jax.checkpoints.pretrained import save_model
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.inference import EngineConfig, Session
from msa_jax.serve.keys import Access, Keys, digest_of
from tests.serve.fakes import events_of, eventually, serving

TEXTS = {"a": "one document of alpha", "b": "another one of alpha, a bit longer"}
DOCUMENTS = [*(BankDocument(i, t, f"Title {i}", "alpha") for i, t in TEXTS.items()),
             BankDocument("a", "what only beta may read", namespace="beta")]  # fmt: skip
ROUTER = {"mode": "router", "router_documents": 3}


class Kept(Session):
    """A session that keeps what was handed in."""

    slots = 2

    def submit(self, *args, **kwargs):
        self.submitted.append(super().submit(*args, **kwargs))
        return self.submitted[-1]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of a checkpoint and of a bank."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = Tokenizer.train([*TEXTS.values(), "question"] * 9, vocab_size=340)
    config = MSAConfig.preset(
        "tiny", vocab_size=tokenizer.vocab_size, hidden_size=16, head_dim=4, mlp_size=8, num_layers=1, chunk_size=8,
        router_layers=(0,),
    )  # fmt: skip
    model = MSATransformer(config, rngs=nnx.Rngs(0))
    save_model(model, folder / "model")
    tokenizer.save(folder / "model")
    with MemoryStore.create(folder / "bank", BankSpec.of(model, tokenizer)) as store:
        store.add(DOCUMENTS, DocumentEncoder(model, tokenizer, row_len=64, rows_per_step=2))
    return folder / "model", folder / "bank"


@pytest.fixture(scope="module")
def server(places):
    engine = EngineConfig(slots=Kept.slots, context=192, lengths=(192,), prefill_rows=1, decode_steps=4)
    with Kept.open(places[1], checkpoint=places[0], writable=True, row_len=64, engine=engine) as session:
        session.submitted = []
        with serving(session) as served:
            yield served


def cited(response):
    return {(c["namespace"], c["id"], c["text"]) for c in response.json()["msa"]["citations"]}


def test_it_reads_what_it_may(server, monkeypatch):
    everything = {(d.namespace, d.id, d.text) for d in DOCUMENTS}
    assert cited(server.chat("question", msa=ROUTER, max_tokens=8)) == everything
    beta = {one for one in everything if one[0] == "beta"}
    monkeypatch.setattr(server.service, "keys", Keys({digest_of("k"): Access("k", ("beta", "empty"), False)}))
    body = {"messages": [{"role": "user", "content": "question"}], "max_tokens": 8, "msa": ROUTER}
    with server.http("k") as http:
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200 and cited(response) == beta and "alpha" not in response.text
        assert [d["namespace"] for d in http.get("/v1/documents").json()["data"]] == ["beta"]
        explained = http.post("/v1/explain", json={"question": "question"})
        assert [d["id"] for d in explained.json()["documents"]] == ["a"] and "alpha" not in explained.text
        body["msa"] = ROUTER | {"namespaces": ["empty"]}
        assert cited(http.post("/v1/chat/completions", json=body)) == set()


def test_a_stream_adds_up_to_the_answer(server):
    sampled = {"temperature": 1.0, "seed": 3, "max_tokens": 24, "msa": ROUTER}
    whole = server.chat("question", **sampled).json()
    events = events_of(server.chat("question", stream=True, **sampled).text)
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    assert text == whole["choices"][0]["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert [e["msa"]["citation"] for e in events if "citation" in e.get("msa", {})] == whole["msa"]["citations"]


def test_refusals(server):
    too_long = server.chat("question " * 200)
    assert too_long.status_code == 400 and "shorten the question" in too_long.json()["error"]["message"]
    assert server.chat("question", msa={"namespaces": ["nowhere"]}).status_code == 400
    assert server.chat("question", msa={"timeout": 1e-6}, max_tokens=8).status_code == 504
    abstains = server.chat("question", msa={"abstain_below": 2.0}, max_tokens=8).json()
    assert abstains["msa"]["outcome"] == "not_in_memory" and abstains["choices"][0]["finish_reason"] == "stop"


def test_documents_come_change_and_go(server):
    new = {"id": "n", "text": "the newest of alpha", "namespace": "gamma"}
    ask = {"msa": ROUTER | {"namespaces": ["gamma"]}, "max_tokens": 8}
    with server.http() as http:
        assert http.post("/v1/documents", json=new).json()["added"] == 1
        assert cited(server.chat("question", **ask)) == {("gamma", "n", new["text"])}
        assert http.put("/v1/documents", json=new | {"text": "changed"}).status_code == 200
        assert cited(server.chat("question", **ask)) == {("gamma", "n", "changed")}
        refused = http.post("/v1/documents", json=new)
        assert refused.status_code == 400 and "there with another text" in refused.text
        long = http.post("/v1/documents", json={"id": "l", "text": "long " * 99})
        assert long.status_code == 400 and "the limit is 64" in long.text
        assert http.put("/v1/documents", json={"id": "no", "text": "a"}).status_code == 400
        assert http.delete("/v1/documents/n?namespace=gamma").status_code == 200
        assert cited(server.chat("question", **ask)) == set()
        assert len(http.get("/v1/documents").json()["data"]) == server.metric("msa_documents") == 3
    assert server.metric("msa_slots") == 2 and server.metric("msa_bank_version") == 5


def test_a_client_that_leaves_frees_its_slot(server):
    ask = {"max_tokens": 60, "temperature": 1.0, "stream": True, "msa": {"mode": "latent"}}
    for _ in range(3):
        body = {"messages": [{"role": "user", "content": "question"}]} | ask
        with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as stream:
            next(stream.iter_lines())
    assert eventually(lambda: server.metric("msa_questions_running") == 0)


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
