"""The whole server: its command line, its engine in a process of its own, and the demo model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

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


def test_a_signal_ends_it(server):
    process, _address = server
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
