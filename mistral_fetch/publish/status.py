"""A small web endpoint about this process.

``/status`` is a page for people and ``/status.json`` what it shows, ``/metrics`` is for Prometheus, and ``/ready``
says it all in its status code.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mistral_fetch.errors import RuntimeMissing
from mistral_fetch.publish.listen import ListenAddress, open_listener, reachable_host, show_address
from mistral_fetch.publish.metrics import Metrics
from mistral_fetch.publish.page import load_page
from mistral_fetch.version import __version__

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_READ_TIMEOUT_SECONDS = 10
_TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class StatusServer:
    """Serves the numbers until it is closed; a context manager.

    Args:
        address: Where to listen.
        metrics: What to tell.

    Raises:
        RuntimeMissing: The library for Prometheus' text is not installed.
        ListenRefused: The address cannot be had.
    """

    def __init__(self, address: ListenAddress, metrics: Metrics) -> None:
        try:
            import prometheus_client  # noqa: F401 - asked for now, not at the first scrape
        except ImportError as error:
            raise extra_missing("--status-listen", "prometheus-client") from error
        self._server = _Server(address, metrics)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="status", daemon=True)
        self._thread.start()

    def __enter__(self) -> StatusServer:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Return the address of the root, without a slash at its end."""
        host, port = self._server.socket.getsockname()[:2]
        return f"http://{show_address(reachable_host(host), port)}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def render_metrics(metrics: Metrics) -> bytes:
    """Return the numbers in Prometheus' text form."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Numbers(Collector):
        def collect(self) -> Iterable[Metric]:
            return _families(metrics.snapshot())

    registry = CollectorRegistry()
    registry.register(Numbers())
    return generate_latest(registry)


def extra_missing(what: str, library: str) -> RuntimeMissing:
    """Return the error for a part of this program whose libraries are an extra."""
    return RuntimeMissing(
        f"{what} needs {library}, which is not installed",
        detail="expected the libraries of the extra 'serve', got none",
        hint="pip install 'mistral-fetch[serve]'",
    )


def _families(now: dict[str, Any]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    def counter(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(f"mistral_fetch_{name}", text, labels=[label])
        for key, value in sorted(values.items()):
            family.add_metric([key], value)
        return family

    def gauge(name: str, text: str, value: float) -> Metric:
        return GaugeMetricFamily(f"mistral_fetch_{name}", text, value=value)

    about = InfoMetricFamily("mistral_fetch", "What this process does.")
    about.add_metric([], {"version": __version__, "doing": now["doing"], "model": now["model"]})
    yield about
    received = {"http": 0, "torrent": 0, "local": 0, **now["received_bytes"]}
    uploaded = {"http": 0, "torrent": 0, **now["uploaded_bytes"]}
    failures = {"lie": 0, "piece": 0, "file": 0, **now["verify_failures"]}
    yield counter("received_bytes", "Payload bytes received, by kind of source.", "source", received)
    yield counter("uploaded_bytes", "Payload bytes given away.", "via", uploaded)
    yield counter("verify_failures", "What was not what was promised.", "found", failures)
    yield counter("http_answers", "Answers of the mirror, by status.", "status", now["http_answers"])
    yield gauge("total_bytes", "Size of the model.", now["total_bytes"])
    yield gauge("present_bytes", "Verified bytes of it that are on this disk.", now["present_bytes"])
    yield gauge("peers_connected", "Torrent peers connected.", now["peers"])
    yield gauge("ready", "1 when the model is complete, or the service can be used.", float(now["ready"]))
    if now["seconds_to_ready"] is not None:
        yield gauge("time_to_ready_seconds", "Seconds from the start until then.", now["seconds_to_ready"])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: ListenAddress, metrics: Metrics) -> None:
        self.metrics = metrics
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = open_listener(address)


class _Handler(BaseHTTPRequestHandler):
    timeout = _READ_TIMEOUT_SECONDS
    server_version = "mistral-fetch"
    sys_version = ""
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, _TEXT_TYPE, render_metrics(self.server.metrics))
            return
        if path in ("/", "/status"):
            page = load_page()
            self._answer(200, "text/html; charset=utf-8", page.body, page.headers)
        elif path == "/status.json":
            told = json.dumps(self.server.metrics.picture(), ensure_ascii=False).encode("utf-8", "backslashreplace")
            self._answer(200, "application/json", told, {"Cache-Control": "no-store"})
        elif path == "/ready":
            is_ready = self.server.metrics.is_ready
            self._answer(200 if is_ready else 503, "text/plain", b"ready\n" if is_ready else b"not yet\n")
        else:
            self._answer(404, "text/plain", b"/status, /status.json, /metrics or /ready\n")

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: a scrape every few seconds is no news."""

    def _answer(self, status: int, kind: str, body: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
