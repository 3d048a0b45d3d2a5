"""An engine in this process that says what a test tells it to say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from mistral_runtime.serve.engine_port import EngineState
from mistral_runtime.serve.protocol import Embed, Finished, Generate, Ready, Scored, Stats, Token

Script = Callable[[Generate], "list[Token | Scored | Finished | Exception | asyncio.Event]"]


class ScriptedEngine:
    """Answers with what `script` returns for a request: tokens, errors to raise, events to wait for."""

    def __init__(self, script: Script, *, context: int = 512, vocab_size: int = 300) -> None:
        self.script = script
        self.state: EngineState = "ready"
        self.ready: Ready | None = Ready(context, vocab_size, 4096, 4, "float32", "cpu", 0.1)
        self.stats: Stats | None = Stats(1, 2, 512, 4096, 7, 100, 25, 50)
        self.requests: list[Generate] = []
        self.told: list[str] = []
        self.closed = asyncio.Event()
        self.drained = 0.0

    async def start(self) -> None:
        pass

    async def wait_ready(self) -> None:
        pass

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
            self.closed.set()

    async def embed(self, request: Embed) -> list[float]:
        return [0.6, 0.8]

    async def drain(self, timeout: float) -> None:
        self.drained = timeout

    async def close(self) -> None:
        with suppress(asyncio.CancelledError):
            self.state = "draining"
