"""Tools: in the prompt, in forced forms, and read out of answers."""

from __future__ import annotations

import json
import re

import pytest

from mistral_runtime.serve.chat_schema import ChatMessage, Tool, ToolCall, ToolUse
from mistral_runtime.serve.protocol import Finished, Token
from mistral_runtime.serve.tool_calls import CallScanner, call_grammar
from tests.runtime.serve.web.scripted_engine import events_of

URL = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = {"messages": [{"role": "user", "content": "Is it windy?"}], "tools": [WEATHER]}
CALLS = '[{"name": "weather", "arguments": {"city": "Nice \\"}{ 你"}}, {"name": "weather", "arguments": {"city": "B"}}]'


def native(v3, text):
    """Return a script as Mistral's model writes calls: behind the token for them."""

    def script(request):
        ids = [5, *v3.encode(text, bos=False)]
        return [*(Token(request.id, token) for token in ids), Finished(request.id, "stop", 4, 0, len(ids))]

    return script


@pytest.mark.parametrize("stream", [False, True])
def test_native_calls_are_read_out_of_the_answer(make_service, client_of, v3, stream):
    response = client_of(make_service(native(v3, CALLS))).post(URL, json=ASK | {"stream": stream})
    if stream:
        events = events_of(response.text)
        deltas = [event["choices"][0]["delta"] for event in events]
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [call["index"] for call in calls] == [0, 1]
        assert "".join(delta.get("content", "") for delta in deltas) == ""
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        calls, reason = choice["message"]["tool_calls"], choice["finish_reason"]
        assert choice["message"]["content"] is None
    assert reason == "tool_calls"
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": 'Nice "}{ 你'}, {"city": "B"}]
    assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in calls)


def test_an_answer_in_words_stays_one(make_service, client_of):
    choice = client_of(make_service("It is {windy}")).post(URL, json=ASK).json()["choices"][0]
    assert choice["message"]["content"] == "It is {windy}"
    assert choice["finish_reason"] == "stop"


def test_calls_that_are_none_are_shown_as_text(make_service, client_of, v3):
    choice = client_of(make_service(native(v3, '[{"name": "unknown"'))).post(URL, json=ASK).json()["choices"][0]
    assert choice["message"]["content"].strip() == '[{"name": "unknown"'
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": ["weather"]}]',
        '[{"name": {}}]',
        '[{"name": "weather", "arguments": 5}]',
        "[}{]",
        "[{" * 5000,
        '[{"name',
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_whatever_a_model_writes_as_a_call_is_no_bug(make_service, client_of, v3, text, stream):
    response = client_of(make_service(native(v3, text), context=20_000)).post(URL, json=ASK | {"stream": stream})
    assert response.status_code == 200
    assert "tool_calls" not in response.text
    assert "error" not in response.text


def test_half_a_surrogate_pair_in_a_call_can_be_told(make_service, client_of, v3):
    text = r'[{"name": "weather", "arguments": {"city": "\ud800"}}]'
    choice = client_of(make_service(native(v3, text))).post(URL, json=ASK).json()["choices"][0]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "\ud800"}


def test_definitions_and_history_are_written_by_the_template(prompts, v3):
    writer = prompts["v3"]
    call = ToolCall("call_of_another_server", "weather", '{"city": "Nice"}')
    messages = [
        ChatMessage("user", "Is it windy?"),
        ChatMessage("assistant", "", (call,)),
        ChatMessage("tool", "yes", (), "call_of_another_server"),
    ]
    ids = writer.encode(messages, ToolUse((Tool("weather", "", {"type": "object"}),)))
    pieces = [v3.piece(token) for token in ids]
    for piece in ("[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"):
        assert pieces.count(piece) == 1
    # Both ends of the call carry the same nine letters.
    text = v3.decode(ids)
    (identifier,) = set(re.findall(r'"(?:call_)?id": "([0-9a-f]{9})"', text))
    assert text.count(identifier) == 2


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_held_to_its_schema(make_service, client_of, v3, choice):
    service = make_service('[{"name": "weather", "arguments": {"city": "Nice"}}]')
    answer = client_of(service).post(URL, json=ASK | {"tool_choice": choice}).json()
    request = service.engine.requests[0]
    assert v3.piece(request.prompt[-1]) == "[TOOL_CALLS]"
    schema = json.loads(request.grammar.text)
    assert schema["type"] == "array"
    assert schema["items"]["anyOf"][0]["properties"]["arguments"] == WEATHER["function"]["parameters"]
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("is_array", [False, True])
def test_references_of_parameters_lead_to_where_they_stand_in_the_whole(is_array):
    parameters = {
        "$defs": {"wind": {"enum": ["$ref", "east"]}, "more": {"$ref": "#/$defs/wind"}},
        "properties": {"default": {"$ref": "#/$defs/more"}, "again": {"$ref": "#"}},
    }
    plain = Tool("plain", "", {"type": "object"})
    use = ToolUse((plain, Tool("weather", "", parameters)), forced=True)
    schema = json.loads(call_grammar(use, is_array=is_array).text)

    def at(pointer):
        found = schema
        for step in pointer.removeprefix("#/").split("/"):
            found = found[int(step)] if isinstance(found, list) else found[step]
        return found

    moved = (schema["items"] if is_array else schema)["anyOf"][1]["properties"]["arguments"]
    assert at(at(moved["properties"]["default"]["$ref"])["$ref"]) == {"enum": ["$ref", "east"]}
    assert at(moved["properties"]["again"]["$ref"]) is moved


@pytest.mark.parametrize("template", ["v1", "demo"])
def test_a_forced_call_works_without_a_token_for_it(make_service, client_of, template):
    service = make_service('{"name": "weather", "arguments": {"city": "Nice"}}', template=template)
    answer = client_of(service).post(URL, json=ASK | {"tool_choice": "required"}).json()
    assert json.loads(service.engine.requests[0].grammar.text)["anyOf"][0]["required"] == ["name", "arguments"]
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Nice"}'


@pytest.mark.parametrize(
    "text, is_call",
    [
        ('{"name": "weather", "arguments": {"city": "Nice"}}', True),
        ("It is windy", False),
        ('{"windy": true}', False),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_v1_is_told_of_tools_in_words(make_service, client_of, text, is_call, stream):
    service = make_service(text, template="v1")
    response = client_of(service).post(URL, json=ASK | {"stream": stream})
    assert '"name": "weather"' in service.model.tokenizer.decode(service.engine.requests[0].prompt)
    if stream:
        deltas = [event["choices"][0]["delta"] for event in events_of(response.text)]
        content = "".join(delta.get("content", "") for delta in deltas)
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    else:
        message = response.json()["choices"][0]["message"]
        content, calls = message["content"] or "", message.get("tool_calls", [])
    assert (content == "") == is_call
    assert len(calls) == is_call
    if not is_call:
        assert content == text


def test_the_demo_template_has_no_place_for_tools_unforced(make_service, client_of):
    response = client_of(make_service(template="demo")).post(URL, json=ASK)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"


def test_v1_refuses_results_of_tools(make_service, client_of):
    messages = [*ASK["messages"], {"role": "tool", "content": "5", "tool_call_id": "x"}]
    response = client_of(make_service(template="v1")).post(URL, json={"messages": messages})
    assert response.status_code == 400
    assert "messages[1]" in response.json()["error"]["message"]


def test_tool_choice_none_leaves_the_tools_out(make_service, client_of, v3):
    service = make_service()
    client_of(service).post(URL, json=ASK | {"tool_choice": "none"})
    assert "[AVAILABLE_TOOLS]" not in [v3.piece(token) for token in service.engine.requests[0].prompt]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_are_found_however_the_text_is_cut(size):
    scanner = CallScanner(["weather"])
    calls = [call for at in range(0, len(CALLS), size) for call in scanner.feed(CALLS[at : at + size])]
    assert [json.loads(call.arguments)["city"] for call in calls] == ['Nice "}{ 你', "B"]
