"""What is refused, and in which words."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mistral_runtime.serve.answer_options import MAX_CHOICES
from mistral_runtime.serve.application import ROUTES
from tests.runtime.serve.web.scripted_engine import events_of

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"n": 0}, "n"),
        ({"n": MAX_CHOICES + 1}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"store": True}, "store"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"functions": []}, "functions"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "not json"}, "guided_json"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ],
)
def test_a_wrong_field_is_named(make_service, client_of, changes, param):
    service = make_service()
    response = client_of(service).post(CHAT, json=ASK | changes)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert param.rpartition(".")[2] in error["message"]
    assert service.engine.requests == []


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"suffix": "x"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "stream": True}, "echo"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"prompt": ["x"] * 200, "n": 2}, "n"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(make_service, client_of, changes, param):
    response = client_of(make_service()).post("/v1/completions", json={"prompt": "hi"} | changes)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_what_clients_send_by_habit_is_taken(make_service, client_of):
    habit = {
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "best_of": 1,
        "n": 1,
        "stop": None,
        "logit_bias": None,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "top_k": -1,
        "max_tokens": 5.0,
    }
    assert client_of(make_service()).post(CHAT, json=ASK | habit).status_code == 200


@pytest.mark.parametrize(
    "body, code",
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"a":1,"a":2}', "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"a": "\xff"}', "invalid_json"),
        (b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
    ],
)
def test_a_body_that_is_no_object_is_refused(make_service, client_of, body, code):
    response = client_of(make_service()).post(CHAT, content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


def test_half_a_surrogate_pair_is_refused(make_service, client_of):
    for body in (
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"messages": [{"role": "user", "content": "hi"}], "\\ud800": 1}',
        '{"messages": [{"role": "user", "content": "hi"}], "model": "\\ud800"}',
    ):
        assert client_of(make_service()).post(CHAT, content=body).status_code in (400, 404)


def test_another_kind_of_body_is_refused(make_service, client_of):
    response = client_of(make_service()).post(CHAT, content=b"a=b", headers={"content-type": "text/plain"})
    assert response.json()["error"]["code"] == "content_type"


def test_errors_of_paths_and_methods_have_the_same_form(make_service, client_of):
    client = client_of(make_service())
    for response, status in (
        (client.get("/v1/nothing"), 404),
        (client.get(CHAT), 405),
        (client.get("/v1/models/"), 404),
    ):
        assert (response.status_code, response.json()["error"]["type"]) == (status, "invalid_request_error")
    assert client.post(CHAT, json=ASK | {"model": "gpt"}).json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/other").json()["id"] == "other"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "other"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=8), child, max_size=3),
    max_leaves=6,
)
_NAMES = [
    "model",
    "messages",
    "prompt",
    "input",
    "tokens",
    "n",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "logprobs",
    "top_logprobs",
    "max_tokens",
    "max_completion_tokens",
    "echo",
    "suffix",
    "best_of",
    "logit_bias",
    "tools",
    "tool_choice",
    "response_format",
    "structured_outputs",
    "guided_choice",
    "guided_json",
    "min_tokens",
    "stop_token_ids",
    "encoding_format",
    "priority",
    "ignore_eos",
]
_LIKELY = st.sampled_from(
    [
        "tiny",
        "hi",
        0,
        1,
        2,
        True,
        [1, 2],
        [[1], [2]],
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": ""}],
        [{"role": "tool", "content": "", "tool_call_id": "x"}],
        [{"type": "function", "function": {"name": "f"}}],
        {"5": 1},
        "required",
    ]
)
_BODIES = st.dictionaries(st.sampled_from(_NAMES), _LIKELY | _JSON, max_size=6)
_POSTS = [path for method, path, _handler in ROUTES if method == "POST"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(_POSTS), body=_BODIES, template=st.sampled_from(["v3", "v1", "demo", None]))
def test_no_body_whatever_is_a_bug(make_service, client_of, capfd, path, body, template):
    service = make_service("a b", template=template, context=64)
    response = client_of(service).post(path, content=json.dumps(body))
    assert response.status_code in (200, 400, 404), response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        assert not any("error" in event for event in events_of(response.text))
    elif response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in capfd.readouterr().err
