"""Chat completions over a real socket, with OpenAI's own client."""

import concurrent.futures
import json

import openai
import pytest

from msa_jax.inference.answer import Citation
from tests.serve.fakes import FakeSession, events_of, serving

READ = Citation(number=41, id="d-1", title="Träger", namespace="default", text="was da steht", tokens=5, score=0.75)
USER = [{"role": "user", "content": "eins zwei drei"}]


def script(question):
    return {
        "reads": [READ, "the ", 0.05, "answer"],
        "stops": [7.0],
        "stops late": ["begun ", 7.0],
        "breaks": ["begun", RuntimeError("secret of the engine")],
        "silent": ["it ", "ends", "silent"],
    }.get(question, [f"{word} " for word in question.split()])


@pytest.fixture(scope="module")
def server():
    with serving(FakeSession(script=script)) as served:
        yield served


def ask(client, text, **more):
    return client.chat.completions.create(model="fake", messages=[{"role": "user", "content": text}], **more)


def test_an_answer_with_what_was_read(server):
    answer = ask(server.openai(), "reads")
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("the answer", "assistant", "stop")
    assert (answer.model, answer.object, answer.id[:9]) == ("fake", "chat.completion", "chatcmpl-")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (11, 7, 18)
    msa = answer.model_extra["msa"]
    citation = {"id": "d-1", "title": "Träger", "namespace": "default", "text": "was da steht", "tokens": 5}
    assert msa["citations"] == [citation | {"cut": False, "score": 0.75}]
    events = [{"kind": "read", "id": "d-1", "namespace": "default"}, {"kind": "unknown"}]
    assert [r["events"] for r in msa["rounds"]] == [events]
    assert (msa["outcome"], msa["score"], msa["ignored_messages"]) == ("answered", 0.5, 0)


def test_a_stream_says_the_same_piece_by_piece(server):
    chunks = list(ask(server.openai(), "reads", stream=True, stream_options={"include_usage": True}))
    assert [c.choices[0].delta.content for c in chunks[:-1]] == ["", None, "the ", "answer", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[1].model_extra["msa"]["citation"]["text"] == "was da steht"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 4 + ["stop"]
    assert chunks[-2].model_extra["msa"]["outcome"] == "answered"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 18
    assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"}
    without = list(ask(server.openai(), "reads", stream=True))
    assert len(without) == len(chunks) - 1 and all(c.usage is None for c in without)


def test_a_stream_ends_with_done(server):
    response = server.chat("reads", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert [bool(e["choices"][0]["finish_reason"]) for e in events_of(response.text)] == [False] * 4 + [True]


def test_settings_reach_the_session(server):
    ask(
        server.openai(), "a b", temperature=0.5, top_p=0.9, max_completion_tokens=9, seed=-1, stop=["x", "y"],
        user="someone", metadata={"a": "b"}, n=1, presence_penalty=0.0, response_format={"type": "text"},
        extra_body={"msa": {"mode": "router", "rounds": 2, "documents": 3, "router_documents": 2, "document_tokens": 50,
                            "turn_tokens": 5, "abstain_below": 0.25, "namespaces": [], "top_k": 40, "timeout": 9}},
    )  # fmt: skip
    pending = server.session.submitted[-1]
    config, sampling, budget = pending.config, pending.config.sampling, pending.config.budget
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 40, 2**32 - 1)
    assert (budget.rounds, budget.documents, budget.document_tokens, budget.turn_tokens) == (2, 3, 50, 5)
    assert (budget.answer_tokens, config.mode, config.router_documents) == (9, "router", 2)
    assert (config.stop, config.abstain_below, config.timeout, pending.namespaces) == (("x", "y"), 0.25, 9, ())
    ask(server.openai(), "a", extra_body={"msa": {"timeout": 1e6}}, stop="x", max_tokens=4)
    config = server.session.submitted[-1].config
    assert (config.timeout, config.stop, config.budget.answer_tokens) == (120, ("x",), 4)
    ask(server.openai(), "a")
    config = server.session.submitted[-1].config
    assert (config.sampling.temperature, config.timeout, config.stop) == (0.0, 120, ())


def test_without_a_seed_each_question_draws_its_own(server):
    answers = [ask(server.openai(), "a", temperature=1.0) for _ in range(2)]
    first, second = (answer.model_extra["msa"]["seed"] for answer in answers)
    assert first != second and server.session.submitted[-1].config.sampling.seed == second


def test_the_last_message_is_the_question(server):
    earlier = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "old"},
               {"role": "assistant", "content": "said", "tool_calls": []}]  # fmt: skip
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [*earlier, {"role": "user", "content": parts}]
    answer = server.openai().chat.completions.create(model="fake", messages=messages)
    assert answer.choices[0].message.content == "one two "
    assert server.session.submitted[-1].question == "one\ntwo"
    assert answer.model_extra["msa"]["ignored_messages"] == 3


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "{'type': 'json_object'} is not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"n": 2}, "n", "n 2 is not supported: leave it out"),
        ({"n": True}, "n", "n True is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"temperature": -1}, "temperature", "must be greater than or equal to 0"),
        ({"top_p": 0}, None, "top_p must be above 0"),
        ({"max_tokens": 0}, "max_tokens", "must be greater than or equal to 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one"),
        ({"stop": ["a"] * 5}, "stop", "must have at most 4 items, got"),
        ({"stop": ""}, "stop[0]", "must have at least 1 character"),
        ({"seed": 2**63}, "seed", "must be less than"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "for streams"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other", "is not a field"),
        ({"extra_body": {"speed": 9}}, "speed", "'speed' is not a field"),
        ({"extra_body": {"msa": {"mode": "best"}}}, None, "mode must be one of generate, constrained, router, latent"),
        ({"extra_body": {"msa": {"hops": 1}}}, "msa.hops", "there are mode, rounds"),
        ({"extra_body": {"msa": {"namespaces": "a"}}}, "msa.namespaces", "must be a valid list"),
        ({"extra_body": {"msa": {"namespaces": ["nowhere"]}}}, "messages", "no namespace"),
        ({"extra_body": {"msa": {"timeout": -3}}}, None, "timeout must be above 0"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, more, param, said):
    before = len(server.session.submitted)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server.openai(), "a", **more)
    assert said in caught.value.body["message"] and caught.value.body["param"] == param
    assert caught.value.body["type"] == "invalid_request_error" and len(server.session.submitted) == before


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hello"], "messages[0]"),
        ([{"role": "oracle", "content": "a"}], "messages[0].role"),
        ([*USER, {"role": "assistant", "content": "a"}], "messages[1].role"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "  "}], "messages"),
    ],
)
def test_messages_that_ask_nothing_are_refused(server, messages, param):
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai().chat.completions.create(model="fake", messages=messages)
    assert caught.value.body["param"] == param


def test_models(server):
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["fake"] and client.models.retrieve("fake").id == "fake"
    for call in (
        lambda: client.models.retrieve("gpt"),
        lambda: client.chat.completions.create(model="x", messages=USER),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"


def test_time_runs_out(server):
    short = {"msa": {"timeout": 0.1}}
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server.openai(), "stops", extra_body=short)
    assert caught.value.status_code == 504 and caught.value.code == "timed_out"
    assert caught.value.response.headers["x-should-retry"] == "false"
    begun = ask(server.openai(), "stops late", extra_body=short)
    assert (begun.choices[0].message.content, begun.choices[0].finish_reason) == ("begun ", "length")
    assert begun.model_extra["msa"]["outcome"] == "timed_out"
    with pytest.raises(openai.APIError, match="took longer"):
        list(ask(server.openai(), "stops", stream=True, extra_body=short))


def test_a_question_that_fails(server):
    with pytest.raises(openai.InternalServerError) as caught:
        ask(server.openai(), "breaks")
    assert "log says why" in str(caught.value) and "secret" not in str(caught.value)
    with pytest.raises(openai.APIError, match="log says why"):
        list(ask(server.openai(), "breaks", stream=True))
    assert server.metric("msa_questions_total", outcome="failed") == 2


def test_an_answer_whose_last_event_is_lost_is_found(server):
    assert ask(server.openai(), "silent").choices[0].message.content == "it ends"


@pytest.mark.parametrize("outcome", ["cut", "not_in_memory"])
def test_other_outcomes(server, outcome, monkeypatch):
    monkeypatch.setattr(server.session, "outcome", outcome)
    answer = ask(server.openai(), "a")
    assert answer.choices[0].finish_reason == {"cut": "length", "not_in_memory": "stop"}[outcome]
    assert answer.model_extra["msa"]["outcome"] == outcome


def test_64_clients_at_once_get_their_own_answers(server):
    before = server.metric("msa_questions_total", outcome="answered")

    def one(i):
        client, text = server.openai(), " ".join(f"{i}.{j}" for j in range(i % 7 + 1))
        if i % 2:
            return "".join(c.choices[0].delta.content or "" for c in ask(client, text, stream=True)) == text + " "
        return ask(client, text).choices[0].message.content == text + " "

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        assert all(pool.map(one, range(64)))
    assert server.metric("msa_questions_total", outcome="answered") == before + 64


def test_metrics_count_by_route_and_status(server):
    def count(status):
        return server.metric("msa_requests_total", route="/v1/chat/completions", method="POST", status=status)

    before, tokens = (count("200"), count("400")), server.metric("msa_completion_tokens_total")
    ask(server.openai(), "a")
    server.chat("a", n=2)
    assert (count("200"), count("400")) == (before[0] + 1, before[1] + 1)
    assert server.metric("msa_completion_tokens_total") == tokens + 7
    assert server.metric("msa_first_token_seconds_count") > 0
    assert server.metric("msa_slots") == 4 and server.metric("msa_bank_version") == 3
    assert server.metric("msa_requests_in_flight") == 1  # the one that asks
    with server.http() as http:
        for path in ("/nowhere/7", "/v1/documents/x"):
            assert http.get(path).status_code == 404
        for method in ("BREW", "STIR"):
            assert http.request(method, "/v1/models").status_code == 405
    assert server.metric("msa_requests_total", route="/v1/models", method="other", status="405") == 2
    assert server.metric("msa_requests_total", route="none", status="404") == 1
    assert server.metric("msa_requests_total", route="/v1/documents/{id:path}", status="404") == 1


def test_probes_and_wrong_methods(server):
    with server.http() as http:
        assert http.get("/healthz").json() == {"status": "alive"}
        assert (http.get("/readyz").status_code, http.get("/readyz").json()) == (200, {"status": "ready"})
        wrong = http.get("/v1/chat/completions")
        assert wrong.status_code == 405 and wrong.json()["error"]["type"] == "invalid_request_error"
        assert wrong.headers["allow"] == "POST"
        assert http.get("/").json()["error"]["message"].startswith("There is nothing")


def test_while_it_loads_it_is_alive_and_not_ready():
    with serving() as server:
        session, server.service.session = server.service.session, None
        with server.http() as http:
            assert http.get("/healthz").status_code == 200 and http.get("/readyz").json() == {"status": "loading"}
            assert "msa_requests_total" in http.get("/metrics").text
        response = server.chat("a")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
        server.service.session = session


def test_while_it_stops_nothing_new_is_taken():
    with serving() as server:
        server.service.draining = True
        with server.http() as http:
            assert http.get("/readyz").json() == {"status": "draining"} and http.get("/metrics").status_code == 200
        response = server.chat("a")
        assert (response.status_code, response.headers["connection"], server.session.submitted) == (503, "close", [])


def test_the_log_holds_no_question_and_no_probe(server, caplog):
    with caplog.at_level("INFO"), server.http() as http:
        server.chat("a secret question")
        http.get("/readyz")
    lines = [r.getMessage() for r in caplog.records if r.name == "msa_jax.serve.app"]
    assert len(lines) == 1 and "POST /v1/chat/completions 200" in lines[0] and "secret" not in lines[0]


def test_scores_that_json_cannot_say(server, monkeypatch):
    endless = [Citation(1, "i", "", "default", "t", 1, score=float("inf")), "x"]
    monkeypatch.setattr(server.session, "script", lambda _: endless)
    assert json.loads(server.chat("a").text)["msa"]["citations"][0]["score"] is None
