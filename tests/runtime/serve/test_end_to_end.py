"""The whole server: its command line, its engine in a process of its own, and the demo model."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

import pytest

DEMO = Path(__file__).parents[3] / "mistral_fetch" / "demo_model"
ASK = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
START_SECONDS = 120


def post(address, path, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def is_ready(root):
    try:
        with urllib.request.urlopen(f"{root}/ready", timeout=60):
            return True
    except urllib.error.HTTPError:
        return False


@pytest.fixture(scope="module")
def server():
    """A server of the demo model that is ready, and its address."""
    command = [sys.executable, "-m", "mistral_runtime", "serve", str(DEMO), "--port", "0", "--chat-template", "demo"]
    command += ["--threads", "1", "--dtype", "float32", "--model-name", "demo", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[2]
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(address.removesuffix("/v1")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process, address
        process.kill()


def test_answers_streams_and_scores(server):
    _process, address = server
    answer = json.loads(post(address, "/chat/completions", ASK))
    text = answer["choices"][0]["message"]["content"]
    assert "demonstration model" in text
    assert answer["choices"][0]["finish_reason"] == "stop"

    events = post(address, "/chat/completions", ASK | {"stream": True}).split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text

    ask = {"prompt": "The wind", "echo": True, "logprobs": 1, "max_tokens": 0}
    scored = json.loads(post(address, "/completions", ask))
    assert scored["choices"][0]["text"] == "The wind"
    assert all(value < 0 for value in scored["choices"][0]["logprobs"]["token_logprobs"][1:])


def test_a_form_is_kept(server):
    pytest.importorskip("llguidance")
    _process, address = server
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = json.loads(post(address, "/chat/completions", ASK | {"response_format": form, "max_tokens": 200}))
    assert json.loads(answer["choices"][0]["message"]["content"])["x"] in (1, 2)


@pytest.fixture
def client(server):
    """OpenAI's client of the real engine."""
    openai = pytest.importorskip("openai", reason="needs the openai client")
    with openai.OpenAI(base_url=server[1], api_key="none", max_retries=0) as api:
        yield api


def openai_answer(**changes):
    return {"model": "demo", "messages": ASK["messages"], "temperature": 0, "max_tokens": 200} | changes


@pytest.mark.interop
def test_the_openai_client_hears_the_same_in_every_way(client, server):
    openai = pytest.importorskip("openai", reason="needs the openai client")
    whole = client.chat.completions.create(**openai_answer(logprobs=True, top_logprobs=2)).choices[0]
    assert "".join(token.token for token in whole.logprobs.content).strip() == whole.message.content.strip()
    assert all(token.logprob == token.top_logprobs[0].logprob for token in whole.logprobs.content)

    stream = client.chat.completions.create(**openai_answer(stream=True, stream_options={"include_usage": True}))
    chunks = list(stream)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert told == whole.message.content
    assert chunks[-1].usage.completion_tokens >= len(whole.logprobs.content)

    async def ask():
        async with openai.AsyncOpenAI(base_url=server[1], api_key="none", max_retries=0) as api:
            return await asyncio.gather(*(api.chat.completions.create(**openai_answer()) for _ in range(4)))

    assert {each.choices[0].message.content for each in asyncio.run(ask())} == {whole.message.content}


@pytest.mark.interop
def test_the_openai_client_parses_answers_and_calls(client):
    pytest.importorskip("llguidance")
    openai = pytest.importorskip("openai", reason="needs the openai client")
    pydantic = pytest.importorskip("pydantic")
    wind = pydantic.create_model("Wind", force=(Literal["weak", "strong"], ...))
    report = pydantic.create_model("Report", now=(wind, ...), later=(wind, ...))  # one definition, two references

    parsed = client.chat.completions.parse(**openai_answer(response_format=report)).choices[0].message.parsed
    assert parsed.now.force in ("weak", "strong")

    tools = [openai.pydantic_function_tool(report, name="tell"), openai.pydantic_function_tool(wind, name="blow")]
    ask = openai_answer(tools=tools, max_tokens=1000)  # this model likes line breaks, and they are allowed
    forced = {"type": "function", "function": {"name": "tell"}}
    message = client.chat.completions.parse(**ask, tool_choice=forced).choices[0].message
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, report)
    with client.chat.completions.stream(**ask, tool_choice="required") as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert isinstance(final.message.tool_calls[0].function.parsed_arguments, report | wind)


@pytest.mark.parametrize(
    "smallest", [{"temperature": 5e-324}, {"top_p": 5e-324}, {"temperature": 1, "repetition_penalty": 5e-324}]
)
def test_no_number_ends_the_engine(server, smallest):
    _process, address = server
    answer = json.loads(post(address, "/completions", {"prompt": "The wind", "max_tokens": 4} | smallest))
    assert answer["usage"]["completion_tokens"] == 4


def test_a_signal_ends_it(server):
    process, _address = server
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
