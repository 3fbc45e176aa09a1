"""Documents added, changed, listed and deleted over HTTP."""

import concurrent.futures
import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax.bank import BankDocument
from msa_jax.serve.explain import own_words
from msa_jax.serve.limits import Limits
from tests.serve.fakes import FakeSession, eventually, serving

ONE = {"id": "a/b c", "text": "Straße", "title": "T", "namespace": "mine", "metadata": {"page": 7}}


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.fixture
def http(server):
    server.session.documents = {}
    with server.http() as client:
        yield client


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"documents": []}, "documents", "must have at least 1 item, got []"),
        ({"documents": [{"id": "a", "text": "b"}], "dry": 1}, "dry", "not a field"),
        ({"documents": [{"id": "a", "text": "b"}, {"id": "c"}]}, "documents[1].text", "documents[1].text is missing"),
        ({"documents": ["a"]}, "documents[0]", "must be a JSON object"),
        ({"id": 5, "text": "b"}, "id", "must be a valid string"),
        ({"id": "", "text": "b"}, "id", "at least 1 character"),
        ({"id": "a", "text": "b", "metadata": []}, "metadata", "must be a JSON object"),
        ({"id": "a", "text": "b", "metadata": {"a": json.loads("[" * 40 + "]" * 40)}}, "metadata", "32 deep"),
        ({"id": "a", "text": "b", "body": "c"}, "body", "there are id, text, title, namespace, metadata"),
        ([], None, "must be a JSON object"),
    ],
)
def test_what_is_no_document(server, http, body, param, said):
    response = http.post("/v1/documents", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert said in response.json()["error"]["message"] and server.session.documents == {}


def test_a_server_that_only_reads(http):
    with serving(writable=False) as server, server.http() as http:
        for response in (http.post("/v1/documents", json=ONE), http.delete("/v1/documents/a")):
            assert (response.status_code, response.json()["error"]["code"]) == (403, "read_only")
        assert http.get("/v1/documents").json()["data"] == []


@pytest.mark.parametrize(
    ("passage", "said"),
    [
        ("<|s|>[12]. One text of t", "One text of t"),
        ("One text of t", "One text of t"),
        ("\ufffdtwelve letters and more<|e|>", "twelve letters and more"),
        ("[12]. One text of twelve letters and more[12]", "One text of twelve letters and more"),
        ("[12]", ""),
        ("", ""),
    ],
)
def test_a_passage_is_told_without_its_frame(passage, said):
    assert own_words(passage, "One text of twelve letters and more") == said


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=a", "limit=²", "after=zz", "after=WzFd", "size=3"])
def test_listings_that_cannot_be(http, query):
    assert http.get(f"/v1/documents?{query}").status_code == 400


@settings(max_examples=30)
@given(
    names=st.sets(st.tuples(st.sampled_from(["default", "p", "q"]), st.text("ab/%é", min_size=1, max_size=4))),
    limit=st.integers(1, 5),
    prefix=st.text("ab", max_size=1),
    namespace=st.none() | st.sampled_from(["p", "nowhere"]),
    gone=st.integers(0, 5),
)
def test_pages_hold_every_document_once(server, names, limit, prefix, namespace, gone):
    server.session.documents = {(n, i): BankDocument(i, "t", namespace=n) for n, i in names}
    found, query = [], {"limit": limit, "prefix": prefix} | ({} if namespace is None else {"namespace": namespace})
    with server.http() as http:
        while query.get("after", "") is not None:
            page = http.get("/v1/documents", params=query).json()
            assert len(page["data"]) <= limit and page["has_more"] == (page["next"] is not None)
            found += [(d["namespace"], d["id"]) for d in page["data"]]
            if len(found) > gone:
                server.session.documents.pop(found[-1], None)  # the next page goes on behind one that has gone
            query["after"] = page["next"]
    assert found == sorted((n, i) for n, i in names if i.startswith(prefix) and namespace in (None, n))


def test_questions_are_answered_while_documents_are_added():
    go = threading.Event()
    with serving(FakeSession(go=go), limits=Limits(writes=2, grace=0.2)) as server:
        with concurrent.futures.ThreadPoolExecutor(2) as pool, server.http() as http:
            writes = [pool.submit(http.post, "/v1/documents", json={"id": str(i), "text": "t"}) for i in range(2)]
            assert eventually(lambda: server.service.writes.taken == 2)
            assert server.chat("a").status_code == http.get("/v1/documents").status_code == 200
            assert http.post("/v1/documents", json={"id": "3", "text": "t"}).status_code == 429
            assert not any(one.done() for one in writes)
            go.set()
            assert [one.result().status_code for one in writes] == [200, 200] and server.session.most_adding == 1
        assert server.chat("a").status_code == 200
