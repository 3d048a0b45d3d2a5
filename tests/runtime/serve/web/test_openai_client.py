"""OpenAI's own client against the server, on a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import pytest

from mistral_runtime.serve.api_keys import ApiKeys
from mistral_runtime.serve.engine_port import QueueFull
from mistral_runtime.serve.guard import GuardRules
from mistral_runtime.serve.http_server import HttpServer
from tests.runtime.serve.web.scripted_engine import saying

openai = pytest.importorskip("openai", reason="needs the openai client")
pytestmark = pytest.mark.interop

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def serve():
    """Return a function that starts a server in a thread and gives its base URL; it ends with the test."""
    ends = []

    def start(service):
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        rules = GuardRules(keys=ApiKeys(["a-key"]))
        listening, loops = threading.Event(), []

        async def run():
            server = HttpServer(service, rules, drain_seconds=0, report=lambda _line: None, handles_signals=False)
            loops.append((asyncio.get_running_loop(), server))
            await server.serve(listener, tell_listening=listening.set)

        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        assert listening.wait(30)
        ends.append((thread, *loops[0]))
        return f"http://127.0.0.1:{port}/v1"

    yield start
    for thread, loop, server in ends:
        loop.call_soon_threadsafe(server.stop)
        thread.join(30)


@pytest.fixture
def client(serve):
    """Return a function that starts a server and gives a client of it."""
    opened = []

    def connect(service):
        opened.append(openai.OpenAI(base_url=serve(service), api_key="a-key", max_retries=0))
        return opened[-1]

    yield connect
    for each in opened:
        each.close()


def test_whole_and_streamed_answers(client, make_service):
    api = client(make_service("Hello 你好"))
    answer = api.chat.completions.create(**ASK, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == "Hello 你好"
    assert answer.choices[0].logprobs.content[0].token == " Hello"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    stream = api.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello 你好"
    assert chunks[-1].usage.completion_tokens == 4


def test_the_stream_helper_gathers_the_answer(client, make_service):
    api = client(make_service("one two three"))
    with api.chat.completions.stream(**ASK) as stream:
        assert stream.get_final_completion().choices[0].message.content == "one two three"


def test_async_client(serve, make_service):
    url = serve(make_service("one two three"))

    async def ask():
        async with openai.AsyncOpenAI(base_url=url, api_key="a-key") as api:
            stream = await api.chat.completions.create(**ASK, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == "one two three"


def test_parsed_answers(client, make_service):
    import pydantic

    class Wind(pydantic.BaseModel):
        strong: bool

    service = make_service('{"strong": true}')
    answer = client(service).chat.completions.parse(**ASK, response_format=Wind)
    assert answer.choices[0].message.parsed == Wind(strong=True)
    assert json.loads(service.engine.requests[0].grammar.text)["required"] == ["strong"]


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client, make_service, stream):
    service = make_service('[{"name": "weather", "arguments": {"a": 1}}]')
    api = client(service)
    asked = {**ASK, "tools": [TOOL], "tool_choice": "required"}
    if stream:
        with api.chat.completions.stream(**asked) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = api.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"a": 1})
    # What came back can be sent again.
    history = [*ASK["messages"], choice.message, {"role": "tool", "tool_call_id": call.id, "content": "windy"}]
    api.chat.completions.create(model="tiny", messages=history, tools=[TOOL])


def test_completions_embeddings_and_models(client, make_service):
    api = client(make_service("goes over"))
    answer = api.completions.create(model="tiny", prompt="the wind", echo=True, logprobs=1, max_tokens=2)
    assert answer.choices[0].text == "the wind goes over"
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    chunks = list(api.completions.create(model="tiny", prompt="the wind", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == " goes over"
    vector = api.embeddings.create(model="tiny", input="the wind").data[0].embedding  # base64 on the wire
    assert vector == pytest.approx([0.6, 0.8])
    assert [model.id for model in api.models.list()] == ["tiny", "other"]


def test_errors_are_the_clients_own_kinds(client, serve, make_service):
    service = make_service()
    api = client(service)
    with pytest.raises(openai.BadRequestError) as failure:
        api.chat.completions.create(**ASK, max_tokens=5000)
    assert failure.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="gpt", messages=ASK["messages"])
    service.engine.script = lambda _request: [QueueFull(1)]
    with pytest.raises(openai.RateLimitError):
        api.chat.completions.create(**ASK)
    service.engine.script = saying(service.model.tokenizer, "x")
    with (
        openai.OpenAI(base_url=api.base_url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
