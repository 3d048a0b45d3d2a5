"""Who may ask, and how much: keys, Host and Origin, the size and pace of bodies, and one log line for each request.

Stands before every route as plain ASGI, so that nothing is parsed for whoever has no business here.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mistral_runtime.serve.api_error import ApiError
from mistral_runtime.serve.api_keys import ApiKeys
from mistral_runtime.serve.defaults import MAX_BODY
from mistral_runtime.serve.host_rules import HostRules

BODY_SECONDS = 60.0
# A probe has neither key nor name; the page asks for the key itself.
_OPEN_PATHS = {"/health", "/ready", "/"}
_PROBES = {"/health", "/ready"}
_PREFLIGHT = "content-type, authorization"


@dataclass(frozen=True)
class GuardRules:
    """What is let through."""

    hosts: HostRules = field(default_factory=HostRules)
    keys: ApiKeys | None = None
    max_body: int = MAX_BODY
    body_seconds: float = BODY_SECONDS
    log: Callable[[str], None] | None = None


class Guard:
    """Lets requests through to an application that follow the rules."""

    def __init__(self, app: ASGIApp, rules: GuardRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        log = _Log(scope, headers, self._rules)
        try:
            self._require_allowed(scope, headers)
        except ApiError as error:
            await error.response()(scope, receive, log.wrap(send, closes=True))
            log.write()
            return
        send = log.wrap(send)
        try:
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(send)
            else:
                await self._app(scope, self._bounded(receive), send)
        finally:
            log.write()

    def _require_allowed(self, scope: Scope, headers: Headers) -> None:
        rules, path = self._rules, scope["path"]
        if path not in _PROBES:
            rules.hosts.require_host(headers.getlist("host"), scope.get("server"))
        is_read = scope["method"] in ("GET", "HEAD")
        if not is_read:
            rules.hosts.require_origin(headers.get("origin"), headers.get("host"), scope["scheme"])
        if rules.keys is not None and path not in _OPEN_PATHS and scope["method"] != "OPTIONS":
            rules.keys.require(headers.get("authorization"))
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > rules.max_body:
            raise _too_large(rules.max_body)

    def _bounded(self, receive: Receive) -> Receive:
        """Return a `receive` that counts the body and does not wait for it forever."""
        seen, is_whole = 0, False
        deadline = time.monotonic() + self._rules.body_seconds

        async def bounded() -> Message:
            nonlocal seen, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError as error:
                limit = f"{self._rules.body_seconds:g}"
                raise ApiError(408, f"the body did not arrive within {limit} s", code="body_timeout") from error
            seen += len(message.get("body", b""))
            if seen > self._rules.max_body:
                raise _too_large(self._rules.max_body)
            is_whole = not message.get("more_body", False)
            return message

        return bounded


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body has more than {limit} bytes, the most that is taken", code="body_too_large")


async def _preflight(send: Send) -> None:
    """Say to a browser what a page of an allowed origin may send."""
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", _PREFLIGHT.encode()),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class _Log:
    """Watches one response go out, adds the headers that all have, and tells it in a line without its content."""

    def __init__(self, scope: Scope, headers: Headers, rules: GuardRules) -> None:
        self._scope = scope
        self._rules = rules
        self._started = time.perf_counter()
        self._status = 0
        self._added = {
            "x-request-id": uuid.uuid4().hex,
            "x-content-type-options": "nosniff",
            **rules.hosts.cross_origin_headers(headers.get("origin")),
        }

    def wrap(self, send: Send, *, closes: bool = False) -> Send:
        async def watched(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                added = self._added | ({"connection": "close"} if closes or self._status in (408, 413) else {})
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode("latin-1")) for name, value in added.items()),
                ]
            await send(message)

        return watched

    def write(self) -> None:
        # A probe asks every few seconds; only its 403 or a bug would be news.
        if self._rules.log is None or (self._scope["path"] in _PROBES and self._status in (200, 503)):
            return
        milliseconds = (time.perf_counter() - self._started) * 1000
        line = f"{self._scope['method']} {printable(self._scope['path'])} {self._status} {milliseconds:.0f} ms"
        counts = self._scope.get("mistral_usage")
        self._rules.log(line if counts is None else f"{line} {counts[0]}+{counts[1]} tokens")


def printable(path: str) -> str:
    """Return a path as a log may show it."""
    return "".join(c if c.isprintable() and c != " " else "?" for c in path[:200])
