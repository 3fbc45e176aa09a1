"""API keys: the file, the command that makes it, and that a key is told nothing of other namespaces."""

import json
import re
import stat

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax.bank import BankDocument
from msa_jax.errors import ConfigError
from msa_jax.serve import keys as module
from msa_jax.serve.errors import ApiError
from msa_jax.serve.keys import Access, Keys, add_key, digest_of, main
from tests.serve.fakes import Reading, events_of, serving


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def test_keys_are_made_listed_and_removed(tmp_path, capsys):
    file = tmp_path / "keys.json"
    status, key, _ = run(capsys, "add", file, "--name", "one", "--namespace", "a", "--namespace", "b", "--write")
    _, other, _ = run(capsys, "add", file, "--name", "two", "--all")
    assert status == 0 and re.fullmatch(r"msa-[\w-]{43}\n", key) and key != other
    assert key.strip() not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = Keys.load(file)
    assert keys.access(f"Bearer {key.strip()}") == Access("one", ("a", "b"), True)
    assert keys.access(f"bearer {other.strip()}") == Access("two", None, False)
    for wrong in (None, "", key.strip(), f"Basic {key.strip()}", "Bearer ", f"Bearer {key.strip()}x", "Bearer \udcff"):
        with pytest.raises(ApiError) as caught:
            keys.access(wrong)
        assert caught.value.status == 401
    listed = [json.loads(line) for line in run(capsys, "list", file)[1].splitlines()]
    assert [(one["name"], one["namespaces"]) for one in listed] == [("one", ["a", "b"]), ("two", None)]
    assert run(capsys, "remove", file, "one")[0] == 0
    with pytest.raises(ApiError):
        Keys.load(file).access(f"Bearer {key.strip()}")
    assert run(capsys, "remove", file, "one")[::2] == (1, f"keys: {file}: no key is named 'one': `list` shows those "
                                                          "there are.\n")  # fmt: skip
    assert run(capsys, "add", file, "--name", "two", "--all")[0] == 1


GOOD = {"name": "n", "namespaces": ["a"], "write": False}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        (json.dumps({"msa-secret": GOOD}), "a key itself has no place in it"),
        (json.dumps({"a" * 64: GOOD | {"write": 1}}), "must be {"),
        (json.dumps({"a" * 64: GOOD | {"namespaces": "a"}}), "must be {"),
        (json.dumps({"a" * 64: GOOD | {"extra": 1}}), "must be {"),
        (json.dumps({"a" * 64: GOOD | {"name": ""}}), "must be {"),
        (json.dumps({"a" * 64: []}), "must be {"),
        (json.dumps({"a" * 64: GOOD, "b" * 64: GOOD}), "more than one key is named n"),
    ],
)
def test_bad_files_are_refused(tmp_path, capsys, text, said):
    file = tmp_path / "keys.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        Keys.load(file)
    assert str(file) in str(caught.value)
    assert run(capsys, "list", file)[0] == run(capsys, "add", file, "--name", "x", "--all")[0] == 1
    assert file.read_text() == text


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        Keys.load(tmp_path / "none")


def test_every_key_is_compared_in_full(monkeypatch):
    compared = []
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    digests = [digest_of(str(i)) for i in range(5)]
    Keys({digest: Access() for digest in digests}).access("Bearer 1")
    assert compared == [(digest, digests[1]) for digest in digests]


SPACES = ("alpha", "beta", "gamma", "omega")  # the last has no documents


def secret_of(space):
    """What every text, title, id and metadata of a namespace holds."""
    return f"SECRET-{space}"


def content():
    """Each namespace has a document of its own and one whose id others have too."""
    for space in SPACES[:3]:
        for identity in (f"own-{space}", "shared"):
            words = secret_of(space)
            yield BankDocument(identity, f"{words} text", f"{words} title", space, {"m": words})


@pytest.fixture(scope="module")
def server():
    with serving(Reading(content()), keys=Keys({})) as served:
        yield served


@pytest.fixture(scope="module")
def twin():
    """Has nothing but what the key reaches."""
    with serving(Reading(), keys=Keys({})) as served:
        yield served


NAMED = st.sampled_from([*SPACES, "nowhere", None])
REQUEST = st.one_of(
    st.tuples(
        st.sampled_from(["chat", "explain"]), st.none() | st.lists(NAMED.filter(bool), max_size=3), st.booleans()
    ),
    st.tuples(st.sampled_from(["POST", "PUT"]), NAMED, st.sampled_from(["shared", "new"])),
    st.tuples(
        st.sampled_from(["GET", "DELETE"]), NAMED,
        st.sampled_from(["/v1/documents", "/v1/models", "/metrics", "/v1/documents/shared"])
        | st.sampled_from(SPACES).map("/v1/documents/own-{}".format),
    ),
)  # fmt: skip
VOLATILE = ("id", "created", "waited", "first_token", "seconds")


def told(http, request):
    """Status of a request, and what its response says but for times and its own name."""
    kind, named, what = request
    if kind == "chat":
        body = {"messages": [{"role": "user", "content": "a"}], "stream": what, "seed": 5}
        response = http.post("/v1/chat/completions", json=body | {"msa": {"namespaces": named}})
    elif kind == "explain":
        response = http.post("/v1/explain", json={"question": "a", "namespaces": named, "documents": 1 + what})
    elif kind in ("POST", "PUT"):
        documents = [{"id": what, "text": "mine", "namespace": named}]
        response = http.request(kind, "/v1/documents", json={"documents": documents})
    else:
        query = {} if named is None or not what.startswith("/v1/documents") else {"namespace": named}
        response = http.request(kind, what, params=query)
    streamed = response.headers["content-type"].startswith("text/event-stream")
    values = events_of(response.text) if streamed else [response.json()]
    for value in values:
        # Ids of completions; those of documents stay.
        for part in (value, value.get("msa") or {}) if kind == "chat" else ():
            for name in VOLATILE:
                part.pop(name, None)
    return response.status_code, json.dumps(values, ensure_ascii=False)


@settings(max_examples=50)
@given(
    reach=st.lists(st.sampled_from([*SPACES, "nowhere"]), max_size=3, unique=True),
    write=st.booleans(),
    requests=st.lists(REQUEST, min_size=1, max_size=4),
)
def test_a_key_is_told_as_if_there_were_nothing_else(server, twin, reach, write, requests):
    documents = {(d.namespace, d.id): d for d in content()}
    mine = {key: d for key, d in documents.items() if key[0] in reach}
    server.session.documents, twin.session.documents = dict(documents), dict(mine)
    server.service.keys = twin.service.keys = Keys({digest_of("k"): Access("k", tuple(reach), write)})
    with server.http("k") as http, twin.http("k") as other:
        for request in requests:
            status, said = told(http, request)
            assert (status, said) == told(other, request) and status < 500
            assert not any(secret_of(space) in said for space in SPACES if space not in reach)
            kind, named, _ = request
            if kind == "chat":
                chosen = reach if named is None else named
                assert status == (200 if set(chosen) <= set(reach) else 403)
                reads = {d.text for d in server.session.documents.values() if d.namespace in chosen}
                assert status == 403 or all(text in said for text in reads)
            elif kind in ("POST", "PUT", "DELETE") and not write:
                assert status in (403, 405)
    theirs = {key: d for key, d in server.session.documents.items() if key[0] not in reach}
    assert theirs == {key: d for key, d in documents.items() if key[0] not in reach}
    assert server.session.documents == theirs | twin.session.documents


@pytest.mark.parametrize("path", ["/v1/documents", "/v1/documents/x", "/v1/documents/own-beta"])
def test_a_refusal_does_not_tell_whether_a_namespace_exists(server, path):
    server.session.documents = {(d.namespace, d.id): d for d in content()}
    server.service.keys = Keys({digest_of("k"): Access("k", ("alpha",), True)})
    with server.http("k") as http:
        there, nowhere = (http.get(path, params={"namespace": name}) for name in ("gamma", "mu"))
        assert there.text.replace("gamma", "mu") == nowhere.text and there.status_code == 403
        chats = [http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}],
                           "msa": {"namespaces": [name]}}) for name in ("gamma", "mu")]  # fmt: skip
        assert chats[0].text.replace("gamma", "mu") == chats[1].text and chats[0].status_code == 403
        assert http.get("/metrics").status_code == 403


def test_what_keys_may(server):
    server.session.documents = {(d.namespace, d.id): d for d in content()}
    accesses = {
        "all": Access("all", None, False),
        "one": Access("one", ("beta",), True),
        "none": Access("none", (), True),
    }
    server.service.keys = Keys({digest_of(key): access for key, access in accesses.items()})
    with server.http() as http:
        assert http.get("/healthz").status_code == http.get("/readyz").status_code == 200
        refused = http.get("/v1/nowhere")
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    with server.http("all") as http:
        assert len(http.get("/v1/documents").json()["data"]) == 6 and http.get("/metrics").status_code == 200
        assert http.delete("/v1/documents/shared?namespace=alpha").status_code == 403
    with server.http("one") as http:
        assert {d["namespace"] for d in http.get("/v1/documents").json()["data"]} == {"beta"}
        # The one namespace of a key needs no name.
        assert http.get("/v1/documents/shared").json()["text"] == "SECRET-beta text"
        assert http.post("/v1/documents", json={"id": "x", "text": "y"}).status_code == 200
        assert ("beta", "x") in server.session.documents
    with server.http("none") as http:
        assert http.get("/v1/documents").json()["data"] == []
    with pytest.raises(openai.AuthenticationError) as caught:
        server.openai("wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    answer = server.openai("one").chat.completions.create(model="fake", messages=[{"role": "user", "content": "a"}])
    assert "written" not in answer.model_extra["msa"]["rounds"][0] and "987654" not in answer.model_dump_json()


def test_add_key_to_a_new_file(tmp_path):
    key = add_key(str(tmp_path / "keys"), "n", None, False)
    assert Keys.load(tmp_path / "keys").access(f"Bearer {key}") == Access("n", None, False)
    with pytest.raises(ConfigError, match="choose a place"):
        add_key(str(tmp_path / "no/such/folder/keys"), "n", None, False)
