"""Numbers for whoever watches a fleet: kept from events, served as Prometheus' text and as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import urllib.error
import urllib.request

import pytest

from mistral_fetch.errors import RuntimeMissing
from mistral_fetch.events import (
    BytesDropped,
    BytesReceived,
    Progress,
    SnapshotReady,
    SourceConnected,
    SourceLied,
    TransferPlanned,
)
from mistral_fetch.publish.listen import parse_listen
from mistral_fetch.publish.metrics import Metrics
from mistral_fetch.publish.status import StatusServer, render_metrics

EVENTS = (
    TransferPlanned("tiny", 1000, 100, 2),
    SourceConnected("torrent abcdef12…", 3),
    BytesReceived("mirror.example", "a", 400),
    BytesReceived("torrent abcdef12…", "a", 300),
    BytesReceived("local files", "b", 200),
    BytesDropped("torrent abcdef12…", "a", 100, "a piece did not match its hash"),
    BytesDropped("mirror.example", "a", 100, "the connection broke"),
    SourceLied("mirror.example", "a", "bytes [0, 10)", "sha256:0", "sha256:1"),
    Progress("a", 600),
)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def metrics():
    clock = Clock()
    made = Metrics("pull", clock=clock)
    for event in EVENTS:
        made(event)
    clock.now = 107.5
    return made


def lines(metrics):
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in render_metrics(metrics).decode().splitlines()
        if not line.startswith("#")
    }


def test_events_become_numbers(metrics):
    told = lines(metrics)
    assert told['mistral_fetch_received_bytes_total{source="http"}'] == 400
    assert told['mistral_fetch_received_bytes_total{source="torrent"}'] == 300
    assert told['mistral_fetch_received_bytes_total{source="local"}'] == 200
    assert told['mistral_fetch_verify_failures_total{found="lie"}'] == 1
    assert told['mistral_fetch_verify_failures_total{found="piece"}'] == 1
    assert (told["mistral_fetch_total_bytes"], told["mistral_fetch_present_bytes"]) == (1000, 600)
    assert (told["mistral_fetch_peers_connected"], told["mistral_fetch_ready"]) == (3, 0)
    assert "mistral_fetch_time_to_ready_seconds" not in told


def test_time_to_ready_is_the_first_time(metrics):
    metrics(SnapshotReady("/x", "abc"))
    metrics.clock.now = 200.0
    metrics.set_ready(False)
    metrics.set_ready(True)
    told = lines(metrics)
    assert (told["mistral_fetch_time_to_ready_seconds"], told["mistral_fetch_ready"]) == (7.5, 1)
    assert told["mistral_fetch_present_bytes"] == 1000


def fetch(url, method="GET"):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def test_the_endpoint_answers(metrics):
    with StatusServer(parse_listen("127.0.0.1:0"), metrics) as server:
        status, kind, body = fetch(f"{server.url}/metrics")
        assert (status, kind.partition(";")[0]) == (200, "text/plain")
        assert body == render_metrics(metrics)
        assert body.startswith(b"# HELP mistral_fetch_info")
        status, kind, body = fetch(f"{server.url}/status.json")
        assert (status, kind) == (200, "application/json")
        assert json.loads(body)["received_bytes"] == {"http": 400, "torrent": 300, "local": 200}
        assert fetch(f"{server.url}/ready")[::2] == (503, b"not yet\n")
        metrics.set_ready(True)
        assert fetch(f"{server.url}/ready")[::2] == (200, b"ready\n")
        assert fetch(f"{server.url}/ready", "HEAD")[::2] == (200, b"")
        assert fetch(f"{server.url}/../etc/passwd")[0] == 404


def test_the_page_is_whole_and_asks_nobody_else(metrics):
    with StatusServer(parse_listen("127.0.0.1:0"), metrics) as server:
        with urllib.request.urlopen(f"{server.url}/status", timeout=10) as answer:
            policy, body = answer.headers["Content-Security-Policy"], answer.read().decode()
        assert fetch(f"{server.url}/")[2].decode() == body
    assert policy.startswith("default-src 'none'; connect-src 'self'")
    assert "unsafe" not in policy
    script = body.partition("<script>")[2].partition("</script>")[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert set(re.findall(r"""(?:src|href)=["']([^d"'][^"']*)""", body)) == {"status.json", "metrics"}
    assert set(re.findall(r"https?://[^\s'\"/]+", body)) == {"http://www.w3.org"}, "only the name of SVG's namespace"


def test_a_missing_library_says_what_to_install(metrics, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(RuntimeMissing) as caught:
        StatusServer(parse_listen("127.0.0.1:0"), metrics)
    assert caught.value.hint == "pip install 'mistral-fetch[serve]'"
