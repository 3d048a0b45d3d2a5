"""What the HTTP side needs of an engine, and how an engine says no.

The routes are written against this, so that a test can put an engine of its own in a real one's place.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, Protocol

from mistral_runtime.serve.protocol import Embed, Finished, Generate, Ready, Scored, Stats, Token

EngineState = Literal["loading", "ready", "restarting", "failed", "draining"]


class EngineUnavailable(Exception):
    """The engine cannot answer now: it loads, restarts, has failed or is about to end."""


class EngineFailed(EngineUnavailable):
    """The engine ended and does not come back.

    Args:
        exit_code: That of its process.
        text: The last lines that it wrote for people.
    """

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.text = text


class RequestRefused(Exception):
    """The engine ended an embedding without a vector; `finished` says why."""

    def __init__(self, finished: Finished) -> None:
        super().__init__(finished.reason if finished.error is None else finished.error["what"])
        self.finished = finished


class QueueFull(Exception):
    """As many wait as may wait; ask again in `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class EnginePort(Protocol):
    """Whatever computes answers, seen from asyncio."""

    @property
    def state(self) -> EngineState:
        """How it is."""

    @property
    def ready(self) -> Ready | None:
        """What it said once the model was loaded."""

    @property
    def stats(self) -> Stats | None:
        """What it said last about its load."""

    async def start(self) -> None:
        """Begin to load; return at once."""

    async def wait_ready(self) -> None:
        """Return once the model is loaded. Raises EngineFailed."""

    def generate(self, request: Generate) -> AsyncGenerator[Token | Scored | Finished, None]:
        """Give the answer's tokens. Closing it early ends the computing at once.

        Raises EngineUnavailable, or QueueFull, when its first item is asked for.
        """

    async def embed(self, request: Embed) -> list[float]:
        """Return one embedding. Raises EngineUnavailable, QueueFull, RequestRefused."""

    async def drain(self, timeout: float) -> None:
        """Take nothing new, and wait so many seconds at most for what is under way."""

    async def close(self) -> None:
        """End it."""
