"""A web mirror on loopback that can lie, stall and break as told. Public: for tests, the demo and your trials.

    with MirrorSimulator({"model.bin": content}) as mirror:
        mirror.script("model.bin", [Fault(reset_at=1000), None])   # first request breaks, the second is served
        ... fetch mirror.url("model.bin") ...
        assert mirror.bytes_sent("model.bin") < 2 * len(content)

Standard library only. A well-behaved request gets ranges, validators and keep-alive as RFC 9110 wants them; every
deviation is a field of :class:`Fault`. Run as a program it serves a directory::

    python -m mistral_fetch.simulators.mirror --dir DIR [--listen 127.0.0.1:0] [--rate BYTES_PER_SECOND]

prints one JSON line ``{"url": …}`` when ready, and ends on SIGTERM or when its standard input closes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import mimetypes
import os
import re
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from mistral_fetch.simulators.faults import Content, Fault, Reply, SeenRequest, ServedRequest

__all__ = ["Content", "Fault", "MirrorSimulator", "Reply", "SeenRequest", "ServedRequest", "main"]

_SLICE_BYTES = 64 * 1024
_SENDFILE_BYTES = 8 * 1024 * 1024
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


Rule = Callable[[SeenRequest], "Fault | None"]


class MirrorSimulator:
    """A threaded HTTP/1.1 server on loopback.

    Args:
        files: Content by path, or a directory to serve.
        listen: Address and port; port 0 takes a free one.
        rate_bytes_per_second: How fast each answer is sent; None for as fast as it goes.
        tls: Speak https with this context.
        send_buffer_bytes: The size of the sockets' send buffers, so that tests know what may be in flight.
    """

    def __init__(
        self,
        files: Mapping[str, bytes] | Path,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        *,
        rate_bytes_per_second: float | None = None,
        tls: ssl.SSLContext | None = None,
        send_buffer_bytes: int | None = None,
    ) -> None:
        self.files: dict[str, bytes] | Path = files if isinstance(files, Path) else dict(files)
        self.rate_bytes_per_second = rate_bytes_per_second
        self.tls = tls
        self.send_buffer_bytes = send_buffer_bytes
        self.served: list[ServedRequest] = []
        self.connections_made: list[tuple[str, int]] = []
        self.rule: Rule | None = None
        self.stopping = threading.Event()
        self._scripts: dict[str, list[Fault | None]] = {}
        self._always: dict[str, Fault] = {}
        self._lock = threading.Lock()
        self._server = _Server(listen, self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> MirrorSimulator:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        self._thread.join()

    @property
    def address(self) -> tuple[str, int]:
        """Return the host and port that are listened on."""
        host, port = self._server.socket.getsockname()[:2]
        return str(host), int(port)

    @property
    def base_url(self) -> str:
        """Return the address of the root, without a slash at its end."""
        host, port = self.address
        return f"{'https' if self.tls else 'http'}://{host}:{port}"

    def url(self, path: str) -> str:
        """Return the address of a file."""
        return f"{self.base_url}/{quote(path)}"

    def script(self, path: str, faults: Iterable[Fault | None]) -> None:
        """Misbehave in this order, one entry for each GET of ``path``; after the last one, behave."""
        with self._lock:
            self._scripts[path] = list(faults)

    def always(self, path: str, fault: Fault) -> None:
        """Misbehave at every GET of ``path`` (after its script)."""
        with self._lock:
            self._always[path] = fault

    def requests(self, path: str | None = None, method: str = "GET") -> list[SeenRequest]:
        """Return the requests so far, all or those of one path."""
        with self._lock:
            seen = [entry.request for entry in self.served]
        return [request for request in seen if request.method == method and path in {None, request.path}]

    def bytes_sent(self, path: str | None = None) -> int:
        """Return how many bytes of bodies were handed to the network, in all or for one path."""
        with self._lock:
            return sum(entry.bytes_sent for entry in self.served if path in {None, entry.request.path})

    def answer(self, request: SeenRequest) -> Reply:
        """Return what a well-behaved server says; subclasses add addresses of their own."""
        content = self.content(request.path)
        if content is None:
            return Reply(404, {"Content-Type": "text/plain"}, body=b"not found\n")
        return Reply(200, content=content)

    def content(self, path: str) -> Content | None:
        """Return what lies at ``path``, or None."""
        if isinstance(self.files, Path):
            return _content_of_file(self.files, path)
        data = self.files.get(path)
        if data is None:
            return None
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        return Content(data, f'"{hashlib.sha256(data).hexdigest()[:32]}"', content_type=kind)

    def begin(self, request: SeenRequest) -> tuple[ServedRequest, Fault | None]:
        """Record a request and return how to misbehave at it."""
        entry = ServedRequest(request)
        with self._lock:
            self.served.append(entry)
            if request.method != "GET":
                return entry, None
            script = self._scripts.get(request.path)
            if script:
                return entry, script.pop(0)
            fault = self._always.get(request.path)
        return entry, fault or (self.rule(request) if self.rule else None)


def _content_of_file(root: Path, path: str) -> Content | None:
    file = (root / path).resolve()
    if root.resolve() not in file.parents or not file.is_file():
        return None
    status = file.stat()
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return Content(file, f'"{status.st_mtime_ns:x}-{status.st_size:x}"', formatdate(status.st_mtime, usegmt=True), kind)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, listen: tuple[str, int], simulator: MirrorSimulator) -> None:
        self.simulator = simulator
        self.connections: set[socket.socket] = set()
        super().__init__(listen, _Handler)
        if simulator.send_buffer_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, simulator.send_buffer_bytes)
        if simulator.tls is not None:
            # The handshake waits for the connection's own thread, so that one client cannot hold up the others.
            self.socket = simulator.tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def server_bind(self) -> None:
        # Not HTTPServer's own: that one asks the name service who we are.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", int(self.server_address[1])

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Keep a list of open connections, so that the end of the simulator is the end of them."""
        self.connections.add(request)
        self.simulator.connections_made.append(client_address)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.discard(request)

    def hang_up(self) -> None:
        """Break every open connection."""
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing about clients that hung up; anything else is a defect and is shown."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError, ssl.SSLError)):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal clean: requests are recorded, not printed."""

    def do_GET(self) -> None:
        """Answer with a body."""
        self._serve()

    def do_HEAD(self) -> None:
        """Answer with headers only."""
        self._serve()

    def _serve(self) -> None:
        simulator = self.server.simulator
        path = unquote(urlsplit(self.path).path).lstrip("/")
        request = SeenRequest(self.command, path, {name.lower(): value for name, value in self.headers.items()})
        entry, fault = simulator.begin(request)
        fault = fault or Fault()
        if fault.hang_at == -1:
            self._hang()
            return
        if fault.redirect_to is not None:
            reply = Reply(fault.status or 302, {"Location": fault.redirect_to})
        elif fault.status is not None and fault.status != 200:
            reply = Reply(fault.status, {}, body=fault.body if fault.body is not None else b"")
        else:
            reply = simulator.answer(request)
        _Exchange(self, simulator, request, entry, fault, reply).send()

    def _hang(self) -> None:
        self.close_connection = True
        self.server.simulator.stopping.wait(60)


@dataclass
class _Exchange:
    """One answer being sent."""

    handler: _Handler
    simulator: MirrorSimulator
    request: SeenRequest
    entry: ServedRequest
    fault: Fault
    reply: Reply

    def send(self) -> None:
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
            self._send_body(416, headers | {"Content-Range": f"bytes */{size}"}, Content(b"", ""), 0, 0)
            return
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._send_body(206, headers, content, start, end)

    def _misrepresent(self, content: Content | None) -> Content | None:
        fault = self.fault
        if fault.body is not None and self.reply.content is not None:
            return Content(fault.body, "", content_type="application/octet-stream")
        if content is None or not (fault.wrong_bytes_at or fault.size is not None or fault.is_gzipped):
            return content
        data = bytearray(content.data if isinstance(content.data, bytes) else content.data.read_bytes())
        for offset in fault.wrong_bytes_at:
            data[offset] ^= 0xFF
        if fault.size is not None:
            data = data[: fault.size] + bytes(max(0, fault.size - len(data)))
        return replace(content, data=gzip.compress(bytes(data)) if fault.is_gzipped else bytes(data))

    def _wanted(self, size: int, etag: str, modified: str) -> tuple[int, int] | None:
        match = _RANGE.fullmatch(self.request.range)
        condition = self.request.headers.get("if-range", etag)
        if match is None or self.fault.ignores_range or self.fault.is_gzipped or condition not in {etag, modified}:
            return None
        first, last = match[1], match[2]
        if not first:
            return max(0, size - int(last or 0)), size
        start = int(first) + self.fault.shift_range
        end = min(size, (int(last) + 1 if last else size) + self.fault.shift_range)
        return start, end

    def _send_body(self, status: int, headers: dict[str, str], content: Content, start: int, end: int | None) -> None:
        fault, handler = self.fault, self.handler
        end = content.size if end is None else end
        if fault.content_range is not None:
            headers["Content-Range"] = fault.content_range
        if fault.is_gzipped:
            headers["Content-Encoding"] = "gzip"
        if fault.no_length:
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(end - start)
        headers = {name: value for name, value in (headers | dict(fault.headers)).items() if value}
        self.entry.status = status
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if self.request.method != "HEAD":
            self._stream(content, start, end)

    def _stream(self, content: Content, start: int, end: int) -> None:
        fault = self.fault
        stops = [at for at in (fault.reset_at, fault.end_at, fault.hang_at) if at is not None]
        cut = min([end - start, *stops])
        rate = fault.rate_bytes_per_second or self.simulator.rate_bytes_per_second
        if isinstance(content.data, Path) and rate is None:
            self._send_file(content.data, start, start + cut)
        else:
            self._send_slices(content, start, start + cut, rate)
        if not stops:
            return
        self.handler.close_connection = True
        if fault.hang_at is not None:
            self.simulator.stopping.wait(60)
        elif fault.reset_at is not None:
            self._reset()

    def _send_file(self, path: Path, start: int, end: int) -> None:
        with path.open("rb") as file:
            while start < end:
                length = min(_SENDFILE_BYTES, end - start)
                with self._counted(length):
                    sent = self.handler.connection.sendfile(file, start, length)
                    if sent != length:
                        raise ConnectionError(f"{path} became shorter while it was sent")
                start += length

    def _send_slices(self, content: Content, start: int, end: int, rate: float | None) -> None:
        begun, offset = time.monotonic(), start
        slice_bytes = _SLICE_BYTES if rate is None else max(1, min(_SLICE_BYTES, int(rate / 50)))
        with _reader(content) as read:
            while offset < end and not self.simulator.stopping.is_set():
                data = read(offset, min(slice_bytes, end - offset))
                with self._counted(len(data)):
                    self.handler.connection.sendall(data)
                offset += len(data)
                if rate is not None:
                    ahead = (offset - start) / rate - (time.monotonic() - begun)
                    self.simulator.stopping.wait(max(0.0, ahead))

    @contextmanager
    def _counted(self, length: int) -> Iterator[None]:
        # Counted before it is sent: a client that has the last byte may ask for the count at once.
        self.entry.bytes_sent += length
        try:
            yield
        except OSError:
            self.entry.bytes_sent -= length
            raise

    def _reset(self) -> None:
        # Lingering for zero seconds makes close send RST instead of FIN.
        connection = self.handler.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


@contextmanager
def _reader(content: Content) -> Iterator[Callable[[int, int], bytes]]:
    """Give a function from offset and length to bytes."""
    if isinstance(content.data, bytes):
        view = content.data
        yield lambda offset, length: view[offset : offset + length]
        return
    descriptor = os.open(content.data, os.O_RDONLY)
    try:
        yield lambda offset, length: os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def main(arguments: list[str] | None = None) -> int:
    """Serve a directory until SIGTERM, or until standard input closes because the parent went away."""
    parser = argparse.ArgumentParser(prog="python -m mistral_fetch.simulators.mirror", description=main.__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="the directory to serve")
    parser.add_argument("--listen", default="127.0.0.1:0", help="address and port; port 0 takes a free one")
    parser.add_argument("--rate", type=float, default=None, help="bytes per second of each answer")
    options = parser.parse_args(arguments)
    host, _, port = options.listen.rpartition(":")
    if not options.dir.is_dir() or not port.isdigit():
        parser.error("--dir must be a directory and --listen an address and a port")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    threading.Thread(target=_wait_for_parent, args=(ended,), daemon=True).start()
    with MirrorSimulator(options.dir, (host or "127.0.0.1", int(port)), rate_bytes_per_second=options.rate) as mirror:
        print(json.dumps({"url": mirror.base_url}), flush=True)
        ended.wait()
    return 0


def _wait_for_parent(ended: threading.Event) -> None:
    with suppress(OSError):
        while os.read(0, 4096):
            continue
    ended.set()


if __name__ == "__main__":
    sys.exit(main())
