"""An engine without a model or a process, for tests of what stands before it: it answers with the prompt's own ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from mistral_runtime.serve.engine_port import EngineState, EngineUnavailable
from mistral_runtime.serve.protocol import Embed, Finished, Generate, Ready, Scored, Stats, Token


class FakeEngine:
    """Looks like `EngineClient`.

    Args:
        delay_seconds: Before each token.
        dies_after: The engine ends in the middle of an answer, after so many tokens; None never.
    """

    def __init__(self, *, vocab_size: int = 1024, delay_seconds: float = 0.0, dies_after: int | None = None) -> None:
        self.state: EngineState = "loading"
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.in_flight = 0
        self.requests: list[Generate] = []
        self.cancelled: list[str] = []
        self._ready = Ready(4096, vocab_size, 8192, 8, "none", "fake", 0.0)
        self._delay_seconds, self._dies_after = delay_seconds, dies_after

    async def start(self) -> None:
        """Be ready."""
        self.state, self.ready = "ready", self._ready

    async def wait_ready(self) -> None:
        """Return at once."""

    async def generate(self, request: Generate) -> AsyncGenerator[Token | Scored | Finished, None]:
        """Give the prompt's ids again, round and round, each with a probability of one.

        Raises:
            EngineUnavailable: Not ready, or at the scripted end.
        """
        if self.state != "ready":
            raise EngineUnavailable(f"the engine is {self.state}")
        self.requests.append(request)
        self.in_flight += 1
        done = 0
        try:
            if request.prompt_logprobs is not None:
                yield Scored(request.id, [0.0] * (len(request.prompt) - 1), [[] for _ in request.prompt[1:]])
            for done in range(request.max_new_tokens):  # how far it came is told when it is closed
                await asyncio.sleep(self._delay_seconds)
                if done == self._dies_after:
                    self.state = "failed"
                    raise EngineUnavailable("the engine ended in the middle of the answer")
                logprob = None if request.logprobs is None else 0.0
                yield Token(request.id, request.prompt[done % len(request.prompt)], logprob)
            done = request.max_new_tokens
            yield Finished(request.id, "length", len(request.prompt), 0, done)
        finally:
            self.in_flight -= 1
            if done < request.max_new_tokens:
                self.cancelled.append(request.id)

    async def embed(self, request: Embed) -> list[float]:
        """Return a vector of length one that depends on the prompt's length alone."""
        return [1.0, 0.0] if len(request.prompt) % 2 else [0.0, 1.0]

    async def drain(self, timeout: float) -> None:
        """Take nothing new."""
        self.state = "draining"

    async def close(self) -> None:
        """Take nothing new."""
        self.state = "draining"
