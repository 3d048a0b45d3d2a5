"""Conversations answered, whole and as events."""

from __future__ import annotations

import pytest

from mistral_runtime.errors import BadRequest
from mistral_runtime.serve.engine_port import EngineUnavailable, QueueFull
from mistral_runtime.serve.protocol import Finished, Token
from tests.runtime.serve.web.scripted_engine import events_of, saying

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
URL = "/v1/chat/completions"


def text_of(events, index=0):
    deltas = [choice["delta"] for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(delta.get("content", "") for delta in deltas)


def test_a_whole_answer_has_text_reason_and_usage(make_service, client_of):
    service = make_service("Hello 你好 wind")
    answer = client_of(service).post(URL, json=ASK).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello 你好 wind", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_the_prompt_is_the_templates_and_the_room_is_what_is_left(make_service, client_of, v3):
    service = make_service()
    client_of(service).post(URL, json=ASK)
    (request,) = service.engine.requests
    assert [v3.piece(token) for token in request.prompt] == ["<s>", "[INST]", "▁hi", "[/INST]"]
    assert request.max_new_tokens == 512 - 4
    assert request.stop_ids == [v3.eos_id]
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)


def test_every_setting_reaches_the_engine(make_service, client_of, v3):
    service = make_service()
    settings = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 3,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "logit_bias": {"5": -100},
        "min_tokens": 2,
        "max_completion_tokens": 9,
        "stop_token_ids": [11],
        "ignore_eos": True,
        "priority": -1,
        "n": 2,
    }
    assert client_of(service).post(URL, json=ASK | settings).status_code == 200
    first, second = service.engine.requests
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert sampling.repetition_penalty == 1.2
    assert (first.sampling.seed, second.sampling.seed) == (3, 4)
    assert (first.presence_penalty, first.frequency_penalty, first.logit_bias) == (0.25, -0.5, [(5, -100.0)])
    assert (first.min_tokens, first.max_new_tokens, first.stop_ids, first.priority) == (2, 9, [11], -1)


def test_a_stream_says_the_same_and_cuts_no_character(make_service, client_of):
    text = "Hello 你好 🙂 wind"
    response = client_of(make_service(text)).post(URL, json=ASK | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(events) == text
    assert "�" not in text_of(events)
    assert events[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all("usage" not in event for event in events)


def test_a_stream_ends_with_its_usage_where_asked(make_service, client_of):
    ask = ASK | {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
    events = events_of(client_of(make_service("one two")).post(URL, json=ask).text)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 4
    assert all(event["usage"] is None for event in events[:-1])


def test_several_answers_come_interleaved_by_index(make_service, client_of):
    events = events_of(client_of(make_service("one two three")).post(URL, json=ASK | {"stream": True, "n": 3}).text)
    assert [text_of(events, index) for index in range(3)] == ["one two three"] * 3
    order = [event["choices"][0]["index"] for event in events]
    assert order != sorted(order)
    assert sum(event["choices"][0]["finish_reason"] == "stop" for event in events) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_no_part_of_a_stop_string_is_shown(make_service, client_of, stream):
    service = make_service("the hill stays and the wind goes")
    ask = ASK | {"stop": ["stays and the", "never"], "stream": stream}
    response = client_of(service).post(URL, json=ask)
    text = text_of(events_of(response.text)) if stream else response.json()["choices"][0]["message"]["content"]
    assert text == "the hill "
    assert service.engine.closed == [service.engine.requests[0].id]
    assert len(service.engine.told) < 9  # computing ended there


def test_a_stop_string_before_min_tokens_is_text(make_service, client_of):
    ask = ASK | {"stop": "the", "min_tokens": 3}
    answer = client_of(make_service("the hill the hill the wind")).post(URL, json=ask).json()
    assert answer["choices"][0]["message"]["content"] == "the hill the hill "


def test_the_largest_length_is_told_as_the_reason(make_service, client_of, v3):
    service = make_service(saying(v3, "one two three", reason="length"))
    answer = client_of(service).post(URL, json=ASK | {"max_tokens": 2}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


def test_logprobs_come_with_bytes_and_the_likeliest(make_service, client_of):
    ask = ASK | {"logprobs": True, "top_logprobs": 2}
    answer = client_of(make_service("Hello wind")).post(URL, json=ask).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [" Hello", " wind"]
    assert content[1]["bytes"] == list(b" wind")
    assert content[1]["logprob"] == -0.5
    assert [entry["logprob"] for entry in content[1]["top_logprobs"]] == [-0.5, -1.5]


def test_streamed_logprobs_leave_the_stop_string_out(make_service, client_of):
    ask = ASK | {"logprobs": True, "stream": True, "stop": " stays"}
    events = events_of(client_of(make_service("the hill stays here")).post(URL, json=ask).text)
    entries = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert [token["token"] for entry in entries for token in entry["content"]] == [" the", " hill"]


def test_a_base_model_has_no_chat(make_service, client_of):
    response = client_of(make_service(template=None)).post(URL, json=ASK)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_chat_template"


def test_the_demo_template_ends_at_a_line_break(make_service, client_of):
    service = make_service("An answer\nQ: more", template="demo")
    answer = client_of(service).post(URL, json=ASK).json()
    assert answer["choices"][0]["message"]["content"] == "An answer"


def test_a_form_of_the_answer_outlasts_the_templates_end(make_service, client_of):
    service = make_service('{\n"a": 1}', template="demo")
    answer = client_of(service).post(URL, json=ASK | {"response_format": {"type": "json_object"}}).json()
    assert answer["choices"][0]["message"]["content"] == '{\n"a": 1}'


def test_parts_of_text_are_put_together(make_service, client_of, v3):
    service = make_service()
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "wind"}]
    client_of(service).post(URL, json={"messages": [{"role": "user", "content": parts}]})
    assert v3.decode(service.engine.requests[0].prompt) == "the wind"


def test_too_long_a_prompt_is_refused_with_both_numbers(make_service, client_of):
    service = make_service(context=8)
    response = client_of(service).post(URL, json={"messages": [{"role": "user", "content": "the wind " * 10}]})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "8 tokens" in error["message"]
    assert "24 tokens" in error["message"]
    answer = client_of(service).post(URL, json=ASK | {"max_tokens": 5}).json()
    assert "4 tokens and the answer may have 5, 9 together" in answer["error"]["message"]
    assert service.engine.requests == []


@pytest.mark.parametrize(
    "failure, status, code",
    [
        (QueueFull(7), 429, "queue_full"),
        (EngineUnavailable("it restarts"), 503, "engine_unavailable"),
        (BadRequest("no", detail="expected a, found b", hint="c"), 400, None),
        (RuntimeError("private"), 500, "bug"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_told_by_the_status(make_service, client_of, capfd, failure, status, code, stream):
    service = make_service(lambda _request: [failure])
    response = client_of(service).post(URL, json=ASK | {"stream": stream})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    if status == 429:
        assert response.headers["retry-after"] == "7"
    if status == 500:
        assert "private" not in response.text
        assert "RuntimeError: private" in capfd.readouterr().err


def test_an_error_in_the_middle_is_an_event_and_the_end(make_service, client_of):
    for failure, code in ((EngineUnavailable("it ended"), "engine_unavailable"), (RuntimeError("private"), "bug")):
        service = make_service(lambda request, failure=failure: [Token(request.id, 6303), failure])
        response = client_of(service).post(URL, json=ASK | {"stream": True})
        assert response.status_code == 200
        *_, last = events_of(response.text)
        assert last["error"]["code"] == code
        assert "private" not in response.text


@pytest.mark.parametrize(
    "kind, status, code",
    [
        ("PromptTooLong", 400, "context_length_exceeded"),
        ("BadRequest", 400, None),
        ("NonFiniteLogits", 500, "engine_error"),
    ],
)
def test_the_engines_own_errors_are_told(make_service, client_of, kind, status, code):
    said = {"kind": kind, "what": "it failed", "detail": "expected a, found b", "hint": "c"}
    service = make_service(lambda request: [Finished(request.id, "error", error=said)])
    response = client_of(service).post(URL, json=ASK)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["error"]["message"] == "it failed: expected a, found b"


def test_nothing_is_asked_of_an_engine_that_loads(make_service, client_of):
    service = make_service()
    service.engine.state = "loading"
    response = client_of(service).post(URL, json=ASK)
    assert response.status_code == 503
    assert "retry-after" in response.headers


@pytest.mark.parametrize(
    "schema, kind",
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}, "json_schema"),
        ({"structured_outputs": {"regex": "a+"}}, "regex"),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema"),
        ({"guided_choice": ["a", "b"]}, "choice"),
        ({"guided_regex": "a+"}, "regex"),
        ({"guided_grammar": 'start: "a"'}, "lark"),
        ({"guided_json": '{"type": "object"}'}, "json_schema"),
    ],
)
def test_a_form_of_the_answer_reaches_the_engine(make_service, client_of, schema, kind):
    service = make_service()
    assert client_of(service).post(URL, json=ASK | schema).status_code == 200
    assert service.engine.requests[0].grammar.kind == kind


def test_token_ids_are_told_where_asked(make_service, client_of, v3):
    answer = client_of(make_service("the wind")).post(URL, json=ASK | {"return_token_ids": True}).json()
    assert answer["choices"][0]["token_ids"] == v3.encode("the wind", bos=False)
    assert answer["prompt_token_ids"][0] == v3.bos_id
