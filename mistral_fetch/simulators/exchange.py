"""One answer of the simulated mirror: which status, headers and bytes a reply and a fault come to."""

from __future__ import annotations

import gzip
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler

from mistral_fetch.simulators.faults import Content, Fault, Reply, SeenRequest
from mistral_fetch.simulators.sending import BodySender

_MAX_SILENCE_SECONDS = 60.0
_NOTHING = Content(b"", "")


@dataclass
class Exchange:
    """One answer being sent."""

    handler: BaseHTTPRequestHandler
    request: SeenRequest
    fault: Fault
    reply: Reply
    sender: BodySender

    def send(self) -> None:
        """Send the whole answer, or as much as the fault allows."""
        content = self._misrepresent(self.reply.content)
        if content is None:
            self._send_body(self.reply.status, dict(self.reply.headers), Content(self.reply.body, ""), 0, None)
            return
        size = content.size
        etag = content.etag if self.fault.etag is None else self.fault.etag
        headers = {"Content-Type": content.content_type, "Accept-Ranges": "bytes", **self.reply.headers}
        if etag:
            headers |= {"ETag": etag, "Last-Modified": content.modified}
        wanted = self._wanted(size, etag, content.modified)
        if wanted is None:
            self._send_body(200, headers, content, 0, size)
            return
        start, end = wanted
        if start >= end:
            self._send_body(416, headers | {"Content-Range": f"bytes */{size}"}, _NOTHING, 0, 0)
            return
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._send_body(206, headers, content, start, end)

    def _misrepresent(self, content: Content | None) -> Content | None:
        fault = self.fault
        if fault.body is not None and content is not None:
            return Content(fault.body, "", content_type="application/octet-stream")
        self.sender.flipped = fault.wrong_bytes_at
        if content is None or (fault.size is None and not fault.is_gzipped):
            return content
        data = bytearray(content.data if isinstance(content.data, bytes) else content.data.read_bytes())
        if fault.size is not None:
            data = data[: fault.size] + bytes(max(0, fault.size - len(data)))
        return replace(content, data=gzip.compress(bytes(data)) if fault.is_gzipped else bytes(data))

    def _wanted(self, size: int, etag: str, modified: str) -> tuple[int, int] | None:
        fault, wanted = self.fault, self.request.wanted(size)
        condition = self.request.headers.get("if-range", etag)
        if wanted is None or fault.ignores_range or fault.is_gzipped or condition not in {etag, modified}:
            return None
        start, end = wanted[0] + fault.shift_range, min(size, wanted[1] + fault.shift_range)
        return start, end if fault.max_range_bytes is None else min(end, start + fault.max_range_bytes)

    def _send_body(self, status: int, headers: dict[str, str], content: Content, start: int, end: int | None) -> None:
        end = max(start, (content.size if end is None else end) - self.fault.short_by)
        self._send_head(status, headers, end - start)
        if self.request.method != "HEAD":
            self._stream(content, start, end)

    def _send_head(self, status: int, headers: dict[str, str], length: int) -> None:
        fault, handler = self.fault, self.handler
        if fault.content_range is not None:
            headers["Content-Range"] = fault.content_range
        if fault.is_gzipped:
            headers["Content-Encoding"] = "gzip"
        if fault.no_length:
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(length)
        self.sender.entry.status = status
        handler.send_response(status)
        for name, value in (headers | dict(fault.headers)).items():
            if value:
                handler.send_header(name, value)
        if length == 0 or self.request.method == "HEAD":
            self.sender.visit.leave()
        handler.end_headers()

    def _stream(self, content: Content, start: int, end: int) -> None:
        cut = self.fault.cut(start, end)
        if cut is None:
            self.sender.send_last(content, start, end)
            return
        self.handler.close_connection = True
        self.sender.send(content, start, start + cut)
        if self.fault.hang_at is not None:
            keep_silent(self.handler.connection, self.sender.stopping)
        elif self.fault.reset_at is not None:
            self._reset()

    def _reset(self) -> None:
        # Lingering for zero seconds makes close send RST instead of FIN.
        connection = self.handler.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sender.visit.leave()
        connection.close()


def keep_silent(connection: socket.socket, stopping: threading.Event) -> None:
    """Send nothing until the client hangs up, the simulator ends or a minute has passed."""
    hang_up = select.poll()
    hang_up.register(connection.fileno(), select.POLLRDHUP)
    deadline = time.monotonic() + _MAX_SILENCE_SECONDS
    while not stopping.wait(0.02) and time.monotonic() < deadline and not hang_up.poll(0):
        continue
