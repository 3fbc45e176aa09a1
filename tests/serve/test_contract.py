"""What a server does over whatever session it has: one contract, for the scripted session and for a real one."""

import pytest

from msa_jax.inference import EngineConfig, Session
from msa_jax.serve.keys import Access, Keys, digest_of
from tests.serve.fakes import DOCUMENTS, Reading, events_of, eventually, serving

ROUTER = {"mode": "router", "router_documents": 3}
NEW = {"id": "n/e w", "text": "the newest of alpha", "title": "Träger", "namespace": "gamma", "metadata": {"page": 7}}
PLACE = "/v1/documents/n%2Fe%20w?namespace=gamma"


class Kept(Session):
    """A session that keeps what was handed in."""

    slots = 2

    def submit(self, *args, **kwargs):
        self.submitted.append(super().submit(*args, **kwargs))
        return self.submitted[-1]


@pytest.fixture(scope="module", params=["fake", "real"])
def server(request):
    if request.param == "fake":
        with serving(Reading(DOCUMENTS, slots=2)) as served:
            yield served
        return
    model, bank = request.getfixturevalue("places")
    engine = EngineConfig(slots=Kept.slots, context=192, lengths=(192,), prefill_rows=1, decode_steps=4)
    with Kept.open(bank, checkpoint=model, writable=True, row_len=64, engine=engine) as session:
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
        assert http.post("/v1/documents", json=NEW | {"namespace": "beta"}).status_code == 403


def test_a_stream_adds_up_to_the_answer(server):
    sampled = {"temperature": 1.0, "seed": 3, "max_tokens": 24, "msa": ROUTER}
    whole = server.chat("question", **sampled).json()
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"] > 0
    events = events_of(server.chat("question", stream=True, **sampled).text)
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    assert text == whole["choices"][0]["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert [e["msa"]["citation"] for e in events if "citation" in e.get("msa", {})] == whole["msa"]["citations"]
    volatile = ("waited", "first_token", "seconds")
    told = [{k: v for k, v in msa.items() if k not in volatile} for msa in (events[-1]["msa"], whole["msa"])]
    assert told[0] == told[1] and told[0]["seed"] == 3 and "number" not in told[0]["citations"][0]


def test_what_the_router_finds(server):
    found = server.chat("question", msa=ROUTER | {"router_documents": 1}, max_tokens=8)
    with server.http() as http:
        explained = http.post("/v1/explain", json={"question": "question", "namespaces": ["alpha"]}).json()
        assert explained["object"] == "explanation" and explained["question"] == "question"
        assert {d["id"] for d in explained["documents"]} == {"a", "b"}
        for document in explained["documents"]:
            assert set(document) == {"id", "title", "namespace", "text", "score", "layers"}
            for layer in document["layers"]:
                assert set(layer) == {"layer", "score", "rank", "chunk", "passage", "token"}
                assert layer["passage"] in document["text"]
        one = http.post("/v1/explain", json={"question": "question", "documents": 1}).json()["documents"]
        assert {(d["namespace"], d["id"], d["text"]) for d in one} <= cited(found)
        for bad in ({}, {"question": " "}, {"question": "a", "documents": 0}, {"question": "a", "namespaces": ["no"]}):
            assert http.post("/v1/explain", json=bad).status_code == 400


def test_refusals(server):
    too_long = server.chat("question " * 200)
    assert too_long.status_code == 400 and "shorten the question" in too_long.json()["error"]["message"]
    assert server.chat(" ").json()["error"]["code"] == "question_refused"
    assert server.chat("question", msa={"namespaces": ["nowhere"]}).status_code == 400
    assert server.chat("question", msa={"timeout": 1e-6}, max_tokens=8).status_code == 504
    abstains = server.chat("question", msa={"abstain_below": 2.0}, max_tokens=8).json()
    assert abstains["msa"]["outcome"] == "not_in_memory" and abstains["choices"][0]["finish_reason"] == "stop"


def test_documents_come_change_and_go(server):
    ask = {"msa": ROUTER | {"namespaces": ["gamma"]}, "max_tokens": 8}
    version = server.metric("msa_bank_version")
    with server.http() as http:
        report = http.post("/v1/documents", json={"documents": [NEW]}).json()
        assert (report["object"], report["added"], report["unchanged"]) == ("report", 1, 0)
        assert report["encoded_tokens"] > 0
        assert http.post("/v1/documents", json=NEW).json()["unchanged"] == 1
        assert http.get(PLACE).json() == {"object": "document"} | NEW
        assert cited(server.chat("question", **ask)) == {("gamma", "n/e w", NEW["text"])}
        assert http.put("/v1/documents", json=NEW | {"text": "changed"}).json()["added"] == 1
        assert cited(server.chat("question", **ask)) == {("gamma", "n/e w", "changed")}
        page = http.get("/v1/documents?limit=3").json()
        rest = http.get("/v1/documents", params={"limit": 3, "after": page["next"]}).json()
        listed = [(d["namespace"], d["id"]) for d in page["data"] + rest["data"]]
        assert listed == [("alpha", "a"), ("alpha", "b"), ("beta", "a"), ("gamma", "n/e w")]
        assert page["has_more"] and not rest["has_more"]

        refused = http.post("/v1/documents", json=NEW)
        message = refused.json()["error"]["message"]
        assert refused.status_code == 400 and message.startswith("document 'n/e w'")  # and not where the bank is
        assert "there with another text" in message
        long = http.post("/v1/documents", json={"id": "l", "text": "long " * 99})
        assert long.status_code == 400 and "the limit is 64" in long.text
        missing = http.put("/v1/documents", json={"id": "no", "text": "a"})
        assert missing.status_code == 400 and "`add` it instead" in missing.text

        assert http.delete(PLACE).json()["deleted"] is True
        assert http.get(PLACE).status_code == http.delete(PLACE).status_code == 404
        assert cited(server.chat("question", **ask)) == set()
        assert len(http.get("/v1/documents").json()["data"]) == server.metric("msa_documents") == 3
    assert server.metric("msa_slots") == 2 and server.metric("msa_bank_version") > version


def test_a_client_that_leaves_frees_its_slot(server):
    ask = {"max_tokens": 60, "temperature": 1.0, "stream": True, "msa": {"mode": "latent"}}
    for _ in range(3):
        body = {"messages": [{"role": "user", "content": "question"}]} | ask
        with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as stream:
            next(stream.iter_lines())
    assert eventually(lambda: server.metric("msa_questions_running") == 0)
