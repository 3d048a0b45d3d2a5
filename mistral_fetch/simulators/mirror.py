"""A web mirror on loopback that can lie, stall and break as told. Public: for tests, the demo and your trials.

    with MirrorSimulator({"model.bin": content}) as mirror:
        mirror.script("model.bin", [Fault(reset_at=1000), None])   # first request breaks, the second is served
        ... fetch mirror.url("model.bin") ...
        assert mirror.bytes_sent("model.bin") < 2 * len(content)

Clients with parallel requests are met at bytes, whichever request asks for them and whenever::

        mirror.script_range("model.bin", 70_000, 70_001, [Fault(wrong_bytes_at=(70_000,))])   # once
        mirror.script_range("model.bin", 0, 65_536, [Fault(status=503)], times=-1)            # always

Standard library only. A well-behaved request gets ranges, validators and keep-alive as RFC 9110 wants them; every
deviation is a field of :class:`Fault`. Run as a program it serves a directory::

    python -m mistral_fetch.simulators.mirror --dir DIR [--listen 127.0.0.1:0] [--rate BYTES_PER_SECOND]
        [--max-connections N]

prints one JSON line ``{"url": …}`` when ready, and ends on SIGTERM or when its standard input closes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mimetypes
import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from mistral_fetch.simulators.faults import Content, Fault, Reply, SeenRequest, ServedRequest
from mistral_fetch.simulators.gate import Gate
from mistral_fetch.simulators.scripts import FaultScripts
from mistral_fetch.simulators.server import Server

__all__ = ["Content", "Fault", "MirrorSimulator", "Reply", "SeenRequest", "ServedRequest", "main"]

Rule = Callable[[SeenRequest], "Fault | None"]


class MirrorSimulator:
    """A threaded HTTP/1.1 server on loopback.

    Args:
        files: Content by path, or a directory to serve.
        listen: Address and port; port 0 takes a free one.
        rate_bytes_per_second: How fast each answer is sent; None for as fast as it goes.
        tls: Speak https with this context.
        send_buffer_bytes: The size of the sockets' send buffers, so that tests know what may be in flight.
        max_connections: How many requests are answered at once; further ones get 429 with Retry-After.
        retry_after_seconds: What that Retry-After says.
    """

    def __init__(
        self,
        files: Mapping[str, bytes] | Path,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        *,
        rate_bytes_per_second: float | None = None,
        tls: ssl.SSLContext | None = None,
        send_buffer_bytes: int | None = None,
        max_connections: int | None = None,
        retry_after_seconds: int = 1,
    ) -> None:
        self.files: dict[str, bytes] | Path = files if isinstance(files, Path) else dict(files)
        self.rate_bytes_per_second = rate_bytes_per_second
        self.tls = tls
        self.send_buffer_bytes = send_buffer_bytes
        self.served: list[ServedRequest] = []
        self.connections_made: list[tuple[str, int]] = []
        self.rule: Rule | None = None
        self.stopping = threading.Event()
        self.gate = Gate(max_connections)
        self.retry_after_seconds = retry_after_seconds
        self._scripts = FaultScripts()
        self._etags: dict[str, tuple[bytes, str]] = {}
        self._lock = threading.Lock()
        self._server = Server(listen, self)
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
        self._scripts.set_order(path, faults)

    def script_range(self, path: str, start: int, end: int, faults: Iterable[Fault | None], *, times: int = 1) -> None:
        """Misbehave at GETs of ``path`` that ask for any byte of ``[start, end)``.

        A request without a range asks for all bytes. Of several such scripts the first one that is not over counts,
        and all of them come before the script by order.

        Args:
            path: The file.
            start: The first byte.
            end: The byte after the last one.
            faults: One entry for each such request; None to behave.
            times: How often to go through them; -1 for ever.

        Raises:
            ValueError: There is no fault, or no byte.
        """
        self._scripts.add_range(path, start, end, faults, times)

    def always(self, path: str, fault: Fault) -> None:
        """Misbehave at every GET of ``path`` (after its scripts)."""
        self._scripts.set_always(path, fault)

    @property
    def most_requests_at_once(self) -> int:
        """Return the highest number of requests that were being answered at the same time, refused ones included."""
        return self.gate.most_at_once

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
        hashed, etag = self._etags.get(path, (None, ""))
        if hashed is not data:  # once, and again where a test has put other bytes there
            etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            self._etags[path] = data, etag
        return Content(data, etag, content_type=kind)

    def record(self, request: SeenRequest) -> ServedRequest:
        """Take note of a request."""
        entry = ServedRequest(request)
        with self._lock:
            self.served.append(entry)
        return entry

    def fault_for(self, request: SeenRequest) -> Fault:
        """Return how to misbehave at a request: as scripted, else as the rule says."""
        if request.method != "GET":
            return Fault()
        start, end = self._asked(request) if self._scripts.knows_ranges(request.path) else (0, 0)
        scripted = self._scripts.take(request.path, start, end)
        return scripted or (self.rule(request) if self.rule else None) or Fault()

    def _asked(self, request: SeenRequest) -> tuple[int, int]:
        content = self.answer(request).content
        size = content.size if content else 0
        return request.wanted(size) or (0, size)


def _content_of_file(root: Path, path: str) -> Content | None:
    file = (root / path).resolve()
    if root.resolve() not in file.parents or not file.is_file():
        return None
    status = file.stat()
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return Content(file, f'"{status.st_mtime_ns:x}-{status.st_size:x}"', formatdate(status.st_mtime, usegmt=True), kind)


def main(arguments: list[str] | None = None) -> int:
    """Serve a directory until SIGTERM, or until standard input closes because the parent went away."""
    parser = argparse.ArgumentParser(prog="python -m mistral_fetch.simulators.mirror", description=main.__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="the directory to serve")
    parser.add_argument("--listen", default="127.0.0.1:0", help="address and port; port 0 takes a free one")
    parser.add_argument("--rate", type=float, default=None, help="bytes per second of each answer")
    parser.add_argument("--max-connections", type=int, default=None, help="how many requests are answered at once")
    options = parser.parse_args(arguments)
    host, _, port = options.listen.rpartition(":")
    if not options.dir.is_dir() or not port.isdigit():
        parser.error("--dir must be a directory and --listen an address and a port")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    threading.Thread(target=_wait_for_parent, args=(ended,), daemon=True).start()
    listen = (host or "127.0.0.1", int(port))
    limits = {"rate_bytes_per_second": options.rate, "max_connections": options.max_connections}
    with MirrorSimulator(options.dir, listen, **limits) as mirror:
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
