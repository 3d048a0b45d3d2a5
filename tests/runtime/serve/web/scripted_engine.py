"""An engine in this process that says what a test tells it to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from mistral_runtime.serve.engine_port import EngineState
from mistral_runtime.serve.protocol import Embed, Finished, Generate, Ready, Scored, Stats, Token
from mistral_runtime.tokenizer import Tokenizer

Item = Token | Scored | Finished | Exception | asyncio.Event
Script = Callable[[Generate], list[Item]]


class ScriptedEngine:
    """Answers with what `script` returns for a request: tokens, errors to raise, events to wait for."""

    def __init__(self, script: Script, *, context: int = 512) -> None:
        self.script = script
        self.state: EngineState = "ready"
        self.ready: Ready | None = Ready(context, 32768, 4096, 4, "float32", "cpu", 0.1)
        self.stats: Stats | None = Stats(1, 2, 1024, 4096, 7, 100, 25, 50)
        self.requests: list[Generate] = []
        self.told: list[str] = []
        self.closed: list[str] = []
        self.calls: list[str] = []
        self.load: Callable[[], Any] | None = None

    async def start(self) -> None:
        self.calls.append("start")

    async def wait_ready(self) -> None:
        if self.load is not None:
            await self.load()

    async def generate(self, request: Generate) -> AsyncGenerator[Token | Scored | Finished, None]:
        self.requests.append(request)
        try:
            for step in self.script(request):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    await asyncio.sleep(0)
                    self.told.append(request.id)
                    yield step
        finally:
            self.closed.append(request.id)

    async def embed(self, request: Embed) -> list[float]:
        self.calls.append(request.id)
        return [0.6, 0.8]

    async def drain(self, timeout: float) -> None:
        self.calls.append(f"drain {timeout:g}")

    async def close(self) -> None:
        self.calls.append("close")


def saying(tokenizer: Tokenizer, text: str, *, reason: Any = "stop", cached: int = 3) -> Script:
    """Return a script that says a text, a token at a time and at most as long as asked, with logprobs if wanted."""

    def script(request: Generate) -> list[Item]:
        ids = tokenizer.encode(text, bos=False)[: request.max_new_tokens]
        items: list[Item] = []
        if request.prompt_logprobs is not None:
            count = len(request.prompt) - 1
            items.append(
                Scored(request.id, [-1.0] * count, [[(token, -1.0), (7, -2.0)] for token in request.prompt[1:]])
            )
        items += [token_of(request, token) for token in ids]
        return [*items, Finished(request.id, reason, len(request.prompt), cached, len(ids))]

    return script


def token_of(request: Generate, token: int) -> Token:
    """Return a token with as many alternatives as are wanted."""
    if request.logprobs is None:
        return Token(request.id, token)
    return Token(request.id, token, -0.5, [(token, -0.5), (7, -1.5), (8, -2.5)][: request.logprobs])


def events_of(body: str) -> list[Any]:
    """Return the objects of a stream of events, of which the last has to be [DONE]."""
    events = [event.removeprefix("data: ") for event in body.split("\n\n") if event.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]
