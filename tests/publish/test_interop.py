"""What we publish, read by a program that is not ours."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import socket
import subprocess
import threading

import pytest

from mistral_fetch.bittorrent.bencode import encode
from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.manifest import ModelInfo
from mistral_fetch.publish.build import publish
from mistral_fetch.simulators.mirror import MirrorSimulator

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(60),
    pytest.mark.skipif(shutil.which("aria2c") is None, reason="aria2c is not installed"),
]

FILES = {"consolidated.00.pth": 6_000_000, "params.json": 600, "nested/tokenizer.model": 70_001}
QUIET = ["--enable-dht=false", "--enable-dht6=false", "--bt-enable-lpd=false", "--no-conf", "--seed-time=0"]


class Tracker(http.server.ThreadingHTTPServer):
    """Tells everybody of one peer (BEP 23)."""

    peer_port = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            peer = socket.inet_aton("127.0.0.1") + self.server.peer_port.to_bytes(2, "big")
            body = encode({b"interval": 5, b"peers": peer})
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments):
            """Keep the test's output clean."""


@pytest.fixture
def tracker():
    with Tracker(("127.0.0.1", 0), Tracker.Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def world(tmp_path, tracker):
    """A published model behind a mirror and a seeder; yields the publication and the mirror."""
    model = tmp_path / "served" / "tiny"
    for path, size in FILES.items():
        (model / path).parent.mkdir(parents=True, exist_ok=True)
        (model / path).write_bytes(hashlib.shake_128(path.encode()).digest(size))
    with MirrorSimulator(tmp_path / "served") as mirror:
        published = publish(
            model,
            tmp_path / "served",
            mirrors=[f"{mirror.base_url}/tiny"],
            trackers=[f"http://127.0.0.1:{tracker.server_port}/announce"],
            info=ModelInfo(name="tiny", version="1", licence="Apache-2.0", credit="Somebody & others"),
        )
        settings = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, uploads=True)
        seeder = Seeder(parse_metainfo(published.plain_torrent_path.read_bytes()), model, settings)
        seeder.wait_until_seeding(10)
        tracker.peer_port = seeder.port
        yield published, mirror
        seeder.close()


def aria2c(tmp_path, *arguments):
    command = ["aria2c", *QUIET, "--dir", str(tmp_path / "got"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_exact(directory):
    for path, size in FILES.items():
        assert (directory / path).read_bytes() == hashlib.shake_128(path.encode()).digest(size)


def test_aria2c_reads_the_manifest(tmp_path, world):
    published, _ = world
    aria2c(tmp_path, "--metalink-file", str(published.manifest_path))
    assert_exact(tmp_path / "got")


def test_aria2c_follows_the_manifest_into_the_swarm(tmp_path, world):
    published, mirror = world
    torrent = published.plain_torrent_path
    mirror.files = {torrent.name: torrent.read_bytes()}
    aria2c(tmp_path, "--metalink-file", str(published.manifest_path))
    assert_exact(tmp_path / "got")
    assert mirror.requests(torrent.name)


def test_aria2c_reads_the_plain_torrent(tmp_path, world):
    published, mirror = world
    mirror.files = {}
    aria2c(tmp_path, str(published.plain_torrent_path))
    assert_exact(tmp_path / "got" / "tiny")
