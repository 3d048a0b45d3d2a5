"""The HTTP/1.1 server below the simulated mirror: threads, connections and request lines."""

from __future__ import annotations

import socket
import socketserver
import ssl
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from mistral_fetch.simulators.exchange import Exchange, keep_silent
from mistral_fetch.simulators.faults import Fault, Reply, SeenRequest, ServedRequest
from mistral_fetch.simulators.gate import Gate
from mistral_fetch.simulators.sending import BodySender


class Site(Protocol):
    """Who decides what is answered."""

    gate: Gate
    stopping: threading.Event
    tls: ssl.SSLContext | None
    send_buffer_bytes: int | None
    rate_bytes_per_second: float | None
    retry_after_seconds: int
    connections_made: list[tuple[str, int]]

    def record(self, request: SeenRequest) -> ServedRequest:
        """Take note of a request."""

    def fault_for(self, request: SeenRequest) -> Fault:
        """Return how to misbehave at it."""

    def answer(self, request: SeenRequest) -> Reply:
        """Return what a well-behaved server says."""


class Server(ThreadingHTTPServer):
    """Listens from the start; serves while ``serve_forever`` runs."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, listen: tuple[str, int], site: Site) -> None:
        self.site = site
        self.connections: set[socket.socket] = set()
        super().__init__(listen, _Handler)
        if site.send_buffer_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, site.send_buffer_bytes)
        if site.tls is not None:
            # The handshake waits for the connection's own thread, so that one client cannot hold up the others.
            self.socket = site.tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def server_bind(self) -> None:
        """Bind without HTTPServer's own question to the name service who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", int(self.server_address[1])

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Keep a list of open connections, so that the end of the simulator is the end of them."""
        self.connections.add(request)
        self.site.connections_made.append(client_address)
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
    server: Server
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
        site = self.server.site
        path = unquote(urlsplit(self.path).path).lstrip("/")
        request = SeenRequest(self.command, path, {name.lower(): value for name, value in self.headers.items()})
        with site.gate.enter() as visit:
            entry = site.record(request)
            too_many = Fault(status=429, headers={"Retry-After": str(site.retry_after_seconds)})
            fault = site.fault_for(request) if visit.is_admitted else too_many
            if fault.hang_at == -1:
                self.close_connection = True
                keep_silent(self.connection, site.stopping)
                return
            rate = fault.rate_bytes_per_second or site.rate_bytes_per_second
            sender = BodySender(self.connection, entry, visit, site.stopping, rate)
            Exchange(self, request, fault, _reply(site, request, fault), sender).send()


def _reply(site: Site, request: SeenRequest, fault: Fault) -> Reply:
    if fault.redirect_to is not None:
        return Reply(fault.status or 302, {"Location": fault.redirect_to})
    if fault.status is not None and fault.status != 200:
        return Reply(fault.status, {}, body=fault.body if fault.body is not None else b"")
    return site.answer(request)
