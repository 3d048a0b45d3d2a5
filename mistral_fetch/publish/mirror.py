"""Serve models over HTTP on a local network: ranges, strong validators, nothing but the files of the manifests.

The server is uvicorn, the answers are starlette's; ours is what lies where. The only user of both.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mistral_fetch.publish.listen import ListenAddress, open_listener, reachable_host, show_address
from mistral_fetch.publish.metrics import Metrics
from mistral_fetch.publish.site import Resource
from mistral_fetch.publish.status import extra_missing
from mistral_fetch.publish.watch import stamp_of
from mistral_fetch.units import MIB

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# With starlette's own 64 KiB a big file crawls: each chunk costs a turn of a thread and of the event loop.
CHUNK_BYTES = MIB
_STOP_SECONDS = 2
_BYTE_RANGE = re.compile(rb"\s*bytes\s*=[\s0-9,-]*[0-9][\s0-9,-]*", re.IGNORECASE)
_ENTITY_TAG = re.compile(r'(?:W/)?"([^"]*)"')


class MirrorServer:
    """Serves a site from a thread of its own until it is closed; a context manager.

    Args:
        address: Where to listen.
        site: What lies at each path, see :func:`~mistral_fetch.publish.site.build_site`.
        metrics: Counts answers and bytes.
        logs_access: Write a line to standard error for each request.

    Raises:
        RuntimeMissing: The extra ``serve`` is not installed.
        ListenRefused: The address cannot be had.
    """

    def __init__(
        self, address: ListenAddress, site: Mapping[str, Resource], metrics: Metrics, *, logs_access: bool = False
    ) -> None:
        try:
            import uvicorn

            application = build_application(site, metrics)
        except ImportError as error:
            raise extra_missing("mirror", "starlette and uvicorn") from error
        self._socket = open_listener(address)
        self._host = address.host
        settings = uvicorn.Config(
            application,
            log_level="info" if logs_access else "warning",
            access_log=logs_access,
            log_config=_logging(uvicorn.config.LOGGING_CONFIG),
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        self._server = uvicorn.Server(settings)
        # Not in the main thread: uvicorn would take over the signals, which are the caller's.
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="mirror", daemon=True)
        self._thread.start()

    def __enter__(self) -> MirrorServer:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Return the port."""
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """Return an address of the root, without a slash at its end."""
        return f"http://{show_address(reachable_host(self._host), self.port)}"

    @property
    def is_running(self) -> bool:
        """Return whether requests are answered."""
        return self._server.started and self._thread.is_alive()

    def close(self) -> None:
        """Stop: answers under way have a moment to end."""
        # What is cut off now is no error to be told with a traceback.
        logging.getLogger("uvicorn.error").addFilter(_drop)
        try:
            self._server.should_exit = True
            self._thread.join(_STOP_SECONDS + 5)
            self._socket.close()
        finally:
            logging.getLogger("uvicorn.error").removeFilter(_drop)


def _drop(_record: logging.LogRecord) -> bool:
    return False


def _logging(usual: dict[str, Any]) -> dict[str, Any]:
    """Return uvicorn's logging with all of it on standard error: results alone go to standard output."""
    changed = copy.deepcopy(usual)
    changed["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return changed


def build_application(site: Mapping[str, Resource], metrics: Metrics) -> ASGIApp:
    """Return the ASGI application that answers for a site."""
    from starlette.responses import FileResponse, PlainTextResponse, Response

    class BigFileResponse(FileResponse):
        chunk_size = CHUNK_BYTES

    def answer(scope: Scope) -> Response:
        resource = site.get(scope["path"])
        if resource is None:
            return PlainTextResponse("not found\n", 404)
        if scope["method"] not in {"GET", "HEAD"}:
            return PlainTextResponse("only GET and HEAD\n", 405, {"Allow": "GET, HEAD"})
        headers = {"ETag": f'"{resource.etag}"', "X-Content-Type-Options": "nosniff"}
        if _is_known(scope, resource):
            return Response(status_code=304, headers=headers)
        if resource.location is None:
            return Response(resource.data, headers=headers, media_type=resource.kind)
        if resource.stamp is None or stamp_of(resource.location) != resource.stamp:
            # Its validator would be a lie: these are not the bytes that were hashed.
            metrics.add_failure("file")
            return PlainTextResponse("this file was changed on the server\n", 503)
        status = resource.location.stat()
        return BigFileResponse(resource.location, headers=headers, media_type=resource.kind, stat_result=status)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await answer(scope)(_without_odd_range(scope), receive, _counting(send, metrics))

    return application


def _is_known(scope: Scope, resource: Resource) -> bool:
    """Return whether the client has this version already (RFC 9110, 13.1.2)."""
    told = _header(scope, b"if-none-match").decode("latin-1")
    return told.strip() == "*" or resource.etag in _ENTITY_TAG.findall(told)


def _without_odd_range(scope: Scope) -> Scope:
    """Leave out a range that is none or in another unit: it is to be ignored, not refused (RFC 9110, 14.2)."""
    told = _header(scope, b"range")
    if not told or _BYTE_RANGE.fullmatch(told):
        return scope
    return {**scope, "headers": [(name, value) for name, value in scope["headers"] if name != b"range"]}


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((bytes(value) for name, value in scope["headers"] if name == wanted), b"")


def _counting(send: Send, metrics: Metrics) -> Send:
    status = 0

    async def send_and_count(message: Message) -> None:
        nonlocal status
        await send(message)
        if message["type"] == "http.response.start":
            status = message["status"]
            metrics.add_answer(status)
        else:
            metrics.add_sent(len(message.get("body", b"")))

    return send_and_count
