"""A tracker on loopback (BEP 3, 23): tells each who announces of all the others."""

from __future__ import annotations

import http.server
import socket
import threading
from contextlib import suppress
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

INTERVAL_SECONDS = 5


class TrackerSimulator:
    """A context manager around a running tracker; ``announcements`` are the queries that came, each as a dictionary."""

    def __init__(self) -> None:
        self.announcements: list[dict[str, str]] = []
        self._peers: dict[tuple[str, int], None] = {}
        simulator = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = simulator._answer(self.client_address[0], urlsplit(self.path).query)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(OSError):  # whoever asked may have left
                    self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                """Keep the output clean."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        """Return the port it listens on."""
        return int(self._server.server_port)

    @property
    def url(self) -> str:
        """Return the address to announce to."""
        return f"http://127.0.0.1:{self.port}/announce"

    def add(self, host: str, port: int) -> None:
        """Tell of a peer that does not announce itself; ``host`` is an IPv4 address."""
        self._peers[host, port] = None

    def forget_all(self) -> None:
        """Tell nobody of anybody who announced itself or was added so far."""
        self._peers.clear()

    def __enter__(self) -> TrackerSimulator:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, host: str, query: str) -> bytes:
        fields = {name: values[0] for name, values in parse_qs(query, encoding="latin-1").items()}
        if "port" not in fields:
            return b"d5:filesdee"  # a question for counts (BEP 48)
        self.announcements.append(fields)
        peer = (host, int(fields["port"]))
        others = [other for other in self._peers if other != peer]
        if fields.get("event") == "stopped":
            self._peers.pop(peer, None)
        else:
            self._peers[peer] = None
        packed = b"".join(socket.inet_aton(ip) + port.to_bytes(2, "big") for ip, port in others)
        return b"d8:intervali%de12:min intervali1e5:peers%d:%se" % (INTERVAL_SECONDS, len(packed), packed)
