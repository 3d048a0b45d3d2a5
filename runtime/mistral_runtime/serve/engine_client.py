"""The engine, seen from asyncio: starts its process, hands requests over, and starts it once more if it dies.

Owns which answers are under way and what becomes of them. Imports no torch.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from mistral_runtime.serve.engine_child import EngineChild
from mistral_runtime.serve.engine_port import EngineFailed, EngineState, EngineUnavailable, QueueFull, RequestRefused
from mistral_runtime.serve.protocol import (
    Cancel,
    Drain,
    Embed,
    Embedded,
    Finished,
    Generate,
    Message,
    Ready,
    Scored,
    Stats,
    Step,
    Token,
)

GOOD_HEALTH_SECONDS = 600.0
_MOST_RETRY_SECONDS = 120


Item = Token | Scored | Embedded | Finished


@dataclass
class _UnderWay:
    """One answer's items that were not read yet; None after the engine died.

    Never waits for its reader, so that a slow one holds up nobody. It holds an answer's tokens at most.
    """

    items: asyncio.Queue[Item | None] = field(default_factory=asyncio.Queue)


class EngineClient:
    """One engine process and its successor.

    Args:
        arguments: Of the `engine` command, without `--fd`: the snapshot and flags.
        max_queue: How many may wait beside those that run.
    """

    def __init__(self, arguments: Sequence[str], *, max_queue: int = 64) -> None:
        self.state: EngineState = "loading"
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self._arguments = list(arguments)
        self._max_queue = max_queue
        self._child: EngineChild | None = None
        self._watching: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()  # loaded, or failed
        self._failure: EngineFailed | None = None
        self._under_way: dict[str, _UnderWay] = {}
        self._ready_since: float | None = None
        self._was_restarted = False
        self._ends: deque[float] = deque(maxlen=32)

    @property
    def in_flight(self) -> int:
        """How many requests are under way, those that wait included."""
        return len(self._under_way)

    @property
    def process_id(self) -> int | None:
        """The id of the engine's process."""
        return None if self._child is None else self._child.process.pid

    async def start(self) -> None:
        """Start the process; it loads on its own."""
        self._child = await EngineChild.start(self._arguments)
        self._watching = asyncio.ensure_future(self._watch(self._child))

    async def wait_ready(self) -> None:
        """Return once the model is loaded.

        Raises:
            EngineFailed: It could not be, with the exit code and what it wrote last.
        """
        await self._settled.wait()
        if self._failure is not None:
            raise self._failure

    async def generate(self, request: Generate) -> AsyncGenerator[Token | Scored | Finished, None]:
        """Give an answer's items as they come, `Finished` last. Closing it early ends the computing at once.

        Items that are not read are kept: an answer's tokens at most, which the request itself bounds.

        Raises:
            EngineUnavailable: Now or in the middle: the engine does not run.
            QueueFull: As many are under way as may be.
        """
        under_way = self._begin(request)
        try:
            while True:
                item = await self._next(under_way)
                if not isinstance(item, Embedded):
                    yield item
                if isinstance(item, Finished):
                    return
        finally:
            self._leave(request.id, under_way)

    async def embed(self, request: Embed) -> list[float]:
        """Return one embedding.

        Raises:
            EngineUnavailable: The engine does not run.
            QueueFull: As many are under way as may be.
            RequestRefused: It cannot be embedded.
        """
        under_way = self._begin(request)
        try:
            while True:
                item = await self._next(under_way)
                if isinstance(item, Embedded):
                    return item.vector
                if isinstance(item, Finished):
                    raise RequestRefused(item)
        finally:
            self._leave(request.id, under_way)

    async def drain(self, timeout: float) -> None:
        """Take nothing new, and wait so many seconds at most for what is under way; then end the process."""
        self.state = "draining"
        if self._child is not None and self._watching is not None:
            self._child.send(Drain())
            await asyncio.wait([self._watching], timeout=timeout)
        await self.close()

    async def close(self) -> None:
        """End the process. Whatever is still under way gets EngineUnavailable."""
        if self.state != "failed":
            self.state = "draining"
        # More than once where it was just being started again.
        while self._child is not None and self._watching is not None and not self._watching.done():
            watching = self._watching
            await self._child.end()
            await watching

    def _begin(self, request: Generate | Embed) -> _UnderWay:
        if self.state != "ready" or self._child is None or self.ready is None:
            raise EngineUnavailable(f"the engine is {self.state}")
        if self.in_flight >= self.ready.max_running + self._max_queue:
            raise QueueFull(self._retry_after())
        if request.id in self._under_way:
            raise ValueError(f"{request.id} is under way")
        under_way = self._under_way[request.id] = _UnderWay()
        self._child.send(request)
        return under_way

    async def _next(self, under_way: _UnderWay) -> Item:
        item = await under_way.items.get()
        if item is None:
            raise EngineUnavailable("the engine ended in the middle of the answer")
        return item

    def _leave(self, key: str, under_way: _UnderWay) -> None:
        # Its place in the queue is free once the engine says that it ended.
        if self._under_way.get(key) is under_way and self._child is not None:
            self._child.send(Cancel(key))

    def _retry_after(self) -> int:
        """Return in how many seconds a place should be free: the mean time between the latest answers' ends."""
        if len(self._ends) < 2:
            return 1
        between = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(max(1, math.ceil(between)), _MOST_RETRY_SECONDS)

    async def _watch(self, child: EngineChild) -> None:
        """Hand out what an engine says until it ends, and decide what follows from that."""
        async for message in child.messages():
            self._take(message)
        code = await child.end()
        self.stats = None
        for under_way in self._under_way.values():
            under_way.items.put_nowait(None)
        self._under_way.clear()
        if self._may_restart():
            self.state, self._was_restarted = "restarting", True
            self._settled.clear()
            await self.start()
            return
        if self.state != "draining":
            self.state = "failed"
        self._failure = EngineFailed(code, child.last_words)
        self._settled.set()

    def _may_restart(self) -> bool:
        if self.state != "ready" or self._ready_since is None:
            return False
        return not self._was_restarted or time.monotonic() - self._ready_since >= GOOD_HEALTH_SECONDS

    def _take(self, message: Message) -> None:
        if isinstance(message, Step):
            for token in message.tokens:
                self._hand_out(token)
        elif isinstance(message, Scored | Embedded | Finished):
            self._hand_out(message)
        elif isinstance(message, Stats):
            self.stats = message
        elif isinstance(message, Ready):
            self.ready, self._ready_since = message, time.monotonic()
            if self.state != "draining":
                self.state = "ready"
            self._settled.set()

    def _hand_out(self, item: Item) -> None:
        under_way = self._under_way.get(item.id)
        if under_way is None:
            return
        under_way.items.put_nowait(item)
        if isinstance(item, Finished):
            del self._under_way[item.id]
            self._ends.append(time.monotonic())
