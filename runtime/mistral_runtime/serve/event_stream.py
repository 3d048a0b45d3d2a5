"""Responses that end when nobody waits for them any more: server-sent events, and whole answers alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mistral_runtime.serve.api_error import ClientGone
from mistral_runtime.serve.failures import foreseen

_Result = TypeVar("_Result")
KEEP_ALIVE_SECONDS = 15.0
# An engine that refuses does so at once, and can then be told by the status. A long prompt is not waited for.
REFUSAL_SECONDS = 1.0
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would gather the events
}


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return what `work` returns; cancel it at once when the client goes away.

    Raises:
        ClientGone: It did.
    """
    return await _first(work, _until_gone(request.receive))


class EventStream(Response):
    """Sends JSON objects as server-sent events, then `[DONE]`.

    Args:
        events: Closed as soon as the client is gone.
        keep_alive_seconds: After so long without an event a comment is sent, so that nobody between hangs up.
    """

    def __init__(
        self, events: AsyncGenerator[dict[str, Any], None], *, keep_alive_seconds: float = KEEP_ALIVE_SECONDS
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_seconds = keep_alive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, or as much as there is somebody to read."""
        with suppress(ClientGone):
            await _first(self._send_all(scope, receive, send), _until_gone(receive))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = asyncio.ensure_future(self._next())
        try:
            await asyncio.wait({first}, timeout=REFUSAL_SECONDS)
            error = first.exception() if first.done() else None
            if isinstance(error, Exception):
                await foreseen(error).response()(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send_events(first, send)
        finally:
            await _cancelled(first)
            await self._events.aclose()

    async def _send_events(self, first: asyncio.Future[dict[str, Any] | None], send: Send) -> None:
        beat = _Beat(send, self._keep_alive_seconds)
        try:
            event = await first
            while event is not None:
                await beat.send(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")
                event = await self._next()
        except Exception as error:  # noqa: BLE001 - the status is sent already; the error is an event
            await beat.send(b"data: " + json.dumps(foreseen(error).body()).encode() + b"\n\n")
        finally:
            await beat.stop()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _next(self) -> dict[str, Any] | None:
        return await anext(self._events, None)


class _Beat:
    """Sends what it is given, and a comment whenever nothing was sent for a while."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._has_sent = False
        self._task = asyncio.ensure_future(self._keep_alive())

    async def send(self, data: bytes) -> None:
        self._has_sent = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def stop(self) -> None:
        await _cancelled(self._task)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            if not self._has_sent:
                await self._send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
            self._has_sent = False


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: Coroutine[Any, Any, _Result], gone: Coroutine[Any, Any, None]) -> _Result:
    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(gone))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            await _cancelled(task)


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end, whatever that is: whoever needed its result has it."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
