"""A server that speaks just enough of the API for the page, and says what the test tells it to."""

from __future__ import annotations

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mistral_runtime.serve.page import load_page

MODEL = {"id": "mistral-7b-instruct", "object": "model", "license": "Apache-2.0", "context": 8192}
END = object()


class ScriptedApi(ThreadingHTTPServer):
    """Answers each question with what was put into `say`, piece by piece, until END.

    Attributes:
        say: Pieces of text, dicts (sent as they are as one event) and END.
        refusals: Answers to give instead, (status, body, headers), first come first served.
        asked: The body of every chat request so far.
        keys: The Authorization header of each.
        was_left: Set once a client has gone in the middle of an answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.say: queue.Queue[Any] = queue.Queue()
        self.refusals: list[tuple[int, dict[str, Any], dict[str, str]]] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.was_left = threading.Event()
        self.engine = "ready"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """Return the address of the page."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def answer(self, *pieces: str) -> None:
        """Say these and end."""
        for piece in pieces:
            self.say.put(piece)
        self.say.put(END)

    def close(self) -> None:
        """Stop serving."""
        self.say.put(END)
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedApi
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/":
            page = load_page()
            self._send(200, page.body, page.headers)
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [MODEL]})
        elif self.path == "/health":
            self._json(200, {"engine": self.server.engine})
        else:
            self._json(404, {"error": {"message": "not here"}})

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        if self.server.refusals:
            status, body, headers = self.server.refusals.pop(0)
            self._json(status, body, headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self._stream()
        except OSError:
            self.server.was_left.set()

    def _stream(self) -> None:
        count = 0
        while True:
            try:
                piece = self.server.say.get(timeout=0.02)
            except queue.Empty:
                self._event(b": still here\n\n")
                continue
            if piece is END:
                break
            count += 1
            told = piece if isinstance(piece, dict) else _chunk({"content": piece}, None)
            self._event(f"data: {json.dumps(told)}\r\n\r\n".encode())
        usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
        for last in (_chunk({}, "stop"), {"choices": [], "usage": usage}):
            self._event(f"data: {json.dumps(last)}\n\n".encode())
        self._event(b"data: [DONE]\n\n")

    def _event(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


def _chunk(delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }
