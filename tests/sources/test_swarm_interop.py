"""Torrents between us and programs that are not ours, both ways: aria2 and Transmission, on loopback alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mistral_fetch.publish.build import Publication, publish
from mistral_fetch.simulators.tracker import TrackerSimulator

pytestmark = [pytest.mark.interop, pytest.mark.swarm, pytest.mark.timeout(90)]

FILES = {"consolidated.00.pth": 3_000_000, "params.json": 600, "nested/tokenizer.model": 70_001}
ARIA2 = [
    "aria2c",
    "--no-conf",
    "--enable-dht=false",
    "--enable-dht6=false",
    "--bt-enable-lpd=false",
    "--enable-peer-exchange=false",
    "--interface=127.0.0.1",
]
TRANSMISSION_SETTINGS = {
    "dht-enabled": False,
    "lpd-enabled": False,
    "pex-enabled": False,
    "utp-enabled": False,
    "port-forwarding-enabled": False,
    "bind-address-ipv4": "127.0.0.1",
    "rpc-enabled": False,
}
PATIENCE_SECONDS = 60


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: not installed")


@pytest.fixture
def tracker() -> Iterator[TrackerSimulator]:
    with TrackerSimulator() as tracker:
        yield tracker


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "served" / "tiny"
    for path in FILES:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content(path))
    return directory


@pytest.fixture
def published(model: Path, tracker: TrackerSimulator) -> Publication:
    return publish(model, model.parent, trackers=[tracker.url])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start programs that end with the test; what they print goes to a file each."""
    running: list[subprocess.Popen[str]] = []

    def start(*argv: object, log: str = "log") -> subprocess.Popen[str]:
        with (tmp_path / f"{log}-{len(running)}.txt").open("w") as output:
            process = subprocess.Popen(
                [str(word) for word in argv], stdin=subprocess.PIPE, stdout=output, stderr=output, text=True
            )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        if process.stdin:
            process.stdin.close()


def content(path: str) -> bytes:
    return hashlib.shake_128(path.encode()).digest(FILES[path])


def assert_exact(directory: Path) -> None:
    for path in FILES:
        assert (directory / path).read_bytes() == content(path), path


def is_exact(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return all((directory / path).read_bytes() == content(path) for path in FILES)
    return False


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.05)


def accepts_connections(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def our_seed(start: Callable[..., subprocess.Popen[str]], torrent: Path, model: Path) -> None:
    """Seed in a process of its own, which asks the torrent's tracker for leeches to connect to."""
    code = (
        "import sys, time; from pathlib import Path;"
        "from mistral_fetch.bittorrent.metainfo import parse_metainfo;"
        "from mistral_fetch.bittorrent.seed import Seeder;"
        "from mistral_fetch.bittorrent.settings import SwarmSettings;"
        "settings = SwarmSettings(listen_interfaces='127.0.0.1:0', uploads=True);"
        f"seeder = Seeder(parse_metainfo(Path({str(torrent)!r}).read_bytes()), Path({str(model)!r}), settings);"
        "seeder.wait_until_seeding(30); sys.stdin.read()"
    )
    start(sys.executable, "-c", code)


def our_pull(home: Path, torrent: Path, port: int) -> Path:
    """Pull with the program itself, from one named peer; return the snapshot."""
    argv = [sys.executable, "-m", "mistral_fetch", "pull", str(torrent), "--peer", f"127.0.0.1:{port}", "--json"]
    environment = {
        **os.environ,
        "MISTRAL_FETCH_HOME": str(home),
        "MISTRAL_FETCH_TRACKERS": "false",
        "MISTRAL_FETCH_PEER_TIMEOUT": "30",
    }
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(json.loads(done.stdout)["directory"])


@needs("aria2c")
def test_aria2_leeches_from_our_seed(tmp_path, start, model, published, tracker):
    our_seed(start, published.plain_torrent_path, model)
    wait_for(lambda: tracker.announcements, "our seed's announcement")
    got = tmp_path / "got"
    argv = [*ARIA2, "--seed-time=0", f"--listen-port={free_port()}", f"--dir={got}", str(published.plain_torrent_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_exact(got / "tiny")


@needs("aria2c")
def test_we_leech_from_an_aria2_seed(tmp_path, start, model, published):
    port = free_port()
    seeding = ["--seed-ratio=0", "--check-integrity=true", f"--listen-port={port}", f"--dir={model.parent}"]
    start(*ARIA2, *seeding, published.plain_torrent_path)
    wait_for(lambda: accepts_connections(port), "aria2 to listen")
    assert_exact(our_pull(tmp_path / "cache", published.plain_torrent_path, port))


# It looks every ten seconds whom to send anything.
def transmission(tmp_path: Path, download_directory: Path, port: int, torrent: Path) -> list[str]:
    """Return the command of a Transmission that keeps to loopback."""
    configuration = tmp_path / "transmission"
    configuration.mkdir()
    (configuration / "settings.json").write_text(json.dumps(TRANSMISSION_SETTINGS))
    place = ["-g", str(configuration), "-w", str(download_directory)]
    return ["transmission-cli", *place, "-p", str(port), "-M", str(torrent)]


@pytest.mark.slow
@needs("transmission-cli")
def test_transmission_leeches_from_our_seed(tmp_path, start, model, published, tracker):
    """It takes no loopback addresses from a tracker, so it announces itself first and our seed connects to it."""
    got = tmp_path / "got"
    got.mkdir()
    process = start(*transmission(tmp_path, got, free_port(), published.plain_torrent_path))
    wait_for(lambda: any(a.get("event") == "started" for a in tracker.announcements), "Transmission's announcement")
    our_seed(start, published.plain_torrent_path, model)
    wait_for(lambda: is_exact(got / "tiny"), "Transmission to finish")
    process.send_signal(signal.SIGTERM)


@pytest.mark.slow
@needs("transmission-cli", "transmission-create")
def test_a_torrent_that_transmission_made_is_pulled_from_its_seed(tmp_path, start, model, tracker):
    torrent = tmp_path / "made.torrent"
    subprocess.run(
        ["transmission-create", "-o", str(torrent), "-t", tracker.url, str(model)], check=True, capture_output=True
    )
    port = free_port()
    start(*transmission(tmp_path, model.parent, port, torrent))
    wait_for(lambda: accepts_connections(port), "Transmission to listen")
    assert_exact(our_pull(tmp_path / "cache", torrent, port))


@needs("transmission-show")
def test_transmission_reads_the_plain_torrent_alike(published):
    shown = subprocess.run(
        ["transmission-show", str(published.plain_torrent_path)], check=True, capture_output=True, text=True
    ).stdout
    assert published.plain_info_hash in shown
    assert all(f"tiny/{path}" in shown for path in FILES)
