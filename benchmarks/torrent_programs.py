"""Programs that seed and leech one torrent on loopback: ours, aria2 and Transmission.

Run as a program it is our seed, which asks the torrent's tracker for leeches to connect to: Transmission takes no
loopback addresses from a tracker, but lets itself be connected to.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import free_port
from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.simulators.tracker import TrackerSimulator

ARIA2 = (
    "aria2c",
    "--no-conf",
    "--quiet",
    "--enable-dht=false",
    "--enable-dht6=false",
    "--bt-enable-lpd=false",
    "--enable-peer-exchange=false",
    "--interface=127.0.0.1",
)
TRANSMISSION = {
    "dht-enabled": False,
    "lpd-enabled": False,
    "pex-enabled": False,
    "utp-enabled": False,
    "port-forwarding-enabled": False,
    "bind-address-ipv4": "127.0.0.1",
    "rpc-enabled": False,
}
READY_SECONDS = 120


@dataclass(frozen=True)
class Leech:
    """A program that fetches the torrent: its command, given the torrent, the seed's port and a place."""

    name: str
    command: Callable[[Path, int, Path], list[str]]
    environment: Callable[[Path], Mapping[str, str]] = field(default=lambda _: {})
    seed_comes_to_it: bool = False


def _ours(torrent: Path, port: int, _place: Path) -> list[str]:
    pull = [sys.executable, "-m", "mistral_fetch", "pull", str(torrent), "--quiet"]
    return [*pull, "--peer", f"127.0.0.1:{port}"] if port else pull


def _our_environment(place: Path) -> Mapping[str, str]:
    # It is told of the seed; the tracker would tell it of the seed of another run, too.
    return {"MISTRAL_FETCH_HOME": str(place / "cache"), "MISTRAL_FETCH_TRACKERS": "false"}


def _aria2(torrent: Path, _port: int, place: Path) -> list[str]:
    own = ["--seed-time=0", "--file-allocation=none", f"--listen-port={free_port()}", f"--dir={place}"]
    return [*ARIA2, *own, str(torrent)]


def _transmission(torrent: Path, _port: int, place: Path) -> list[str]:
    configuration = _configure_transmission(place)
    script = configuration / "done.sh"
    script.write_text("#!/bin/sh\nkill $PPID\n")
    script.chmod(0o755)
    options = f"-g {configuration} -w {place} -p {free_port()} -M -f {script} {torrent}"
    return ["sh", "-c", f"transmission-cli {options} >/dev/null 2>&1 || true"]


OURS = Leech("ours", _ours, _our_environment)
LEECHES = (OURS, Leech("aria2c", _aria2), Leech("transmission", _transmission, seed_comes_to_it=True))


@contextmanager
def our_seed(torrent: Path, directory: Path, _tracker: TrackerSimulator, _work: Path) -> Iterator[int]:
    """Seed with our seeder; yield the port."""
    argv = [sys.executable, "-m", "mistral_fetch.simulators.seeder", "--torrent", str(torrent), "--dir", str(directory)]
    process = subprocess.Popen([*argv, "--lie"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with _ending(process):
        assert process.stdout is not None
        yield int(json.loads(process.stdout.readline())["port"])


@contextmanager
def aria2_seed(torrent: Path, directory: Path, tracker: TrackerSimulator, _work: Path) -> Iterator[int]:
    """Seed with aria2; yield the port."""
    port = free_port()
    own = ["--seed-ratio=0", "--bt-seed-unverified=true", f"--listen-port={port}", f"--dir={directory.parent}"]
    with _ending(subprocess.Popen([*ARIA2, *own, str(torrent)], stdout=subprocess.DEVNULL)):
        _wait_for_seed(tracker, port)
        yield port


@contextmanager
def transmission_seed(torrent: Path, directory: Path, tracker: TrackerSimulator, work: Path) -> Iterator[int]:
    """Seed with Transmission; yield the port."""
    port = free_port()
    place = ["-g", str(_configure_transmission(work / "transmission-seed")), "-w", str(directory.parent)]
    argv = ["transmission-cli", *place, "-p", str(port), "-M", str(torrent)]
    with _ending(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)):
        _wait_for_seed(tracker, port)
        yield port


SEEDS = {"ours": our_seed, "aria2c": aria2_seed, "transmission": transmission_seed}


@contextmanager
def seed_that_comes(torrent: Path, directory: Path, tracker: TrackerSimulator) -> Iterator[None]:
    """Start our seed as soon as somebody who lacks bytes has announced itself."""
    seen = len(tracker.announcements)
    running: list[subprocess.Popen[bytes]] = []
    is_over = threading.Event()

    def wait_and_start() -> None:
        while not is_over.wait(0.02):
            if any(a.get("left") != "0" and a.get("event") == "started" for a in tracker.announcements[seen:]):
                argv = [sys.executable, __file__, str(torrent), str(directory)]
                running.append(subprocess.Popen(argv, stdin=subprocess.PIPE))
                return

    thread = threading.Thread(target=wait_and_start)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def _ending(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _wait_for_seed(tracker: TrackerSimulator, port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not any(a["port"] == str(port) and a.get("left") == "0" for a in tracker.announcements):
        if time.monotonic() > deadline:
            sys.exit(f"the seed on port {port} did not become ready")
        time.sleep(0.05)


def _configure_transmission(place: Path) -> Path:
    configuration = place / "configuration"
    configuration.mkdir(parents=True, exist_ok=True)
    (configuration / "settings.json").write_text(json.dumps(TRANSMISSION))
    return configuration


def main() -> None:
    """Seed until killed."""
    torrent, directory = map(Path, sys.argv[1:])
    settings = SwarmSettings(listen_interfaces="127.0.0.1:0", uploads=True)
    seeder = Seeder(parse_metainfo(torrent.read_bytes()), directory, settings, skips_checks=True)
    seeder.wait_until_seeding()
    sys.stdin.read()


if __name__ == "__main__":
    main()
