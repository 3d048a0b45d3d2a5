"""SIGKILL at ten random moments of a pull, then run to the end: exact, and nothing fetched twice beyond a batch."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.units import KIB, MIB
from tests.transfer import engine, processes
from tests.transfer.conftest import Puller

ROOT = Path(__file__).parents[2]
KILLS = 10
BATCH = MIB
PIECE = 256 * KIB
# The program itself, but for a batch that fits the size of a test.
WRAPPER = f"""
from mistral_fetch.store import partials
partials.BATCH_BYTES = {BATCH}
from mistral_fetch.cli.app import main
main()
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]


def start_pull(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the program, in a group of its own so that nothing of it can outlive a kill."""
    argv = [sys.executable, "-c", WRAPPER, "pull", "--json", "--progress", "none", "--home", str(home), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MISTRAL_FETCH_DHT": "0", "MISTRAL_FETCH_LOCK_TIMEOUT": "5"}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def kill_at_random(
    start: Callable[[], subprocess.Popen[str]], sent: Callable[[], int], size: int, seed: int, kills: int = KILLS
) -> int:
    """Kill a fresh pull at random shares of what is left to send; return how many kills hit a running one."""
    chance = random.Random(seed)
    hits = 0
    for kill in range(kills):
        before = sent()
        goal = before + chance.uniform(0.0, 1.6) * max(0, size - before) / (kills - kill)
        deadline = time.monotonic() + 20
        with start() as process:
            while process.poll() is None and sent() <= goal and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.02))
            hits += process.poll() is None
            process.kill()
    return hits


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    """Wait for a pull that nobody kills, and return its result."""
    with process:
        assert process.stdout is not None
        result: dict[str, object] = json.loads(process.stdout.read())
    assert process.returncode == 0, result
    return result


def assert_exact(puller: Puller, result: dict[str, object], publisher: PublisherSimulator) -> None:
    directory = Path(str(result["directory"]))
    assert {path: (directory / path).read_bytes() for path in publisher.files} == publisher.files
    puller.assert_blobs_are_right()
    assert list(puller.home.glob("partial/*")) == []
    assert list(puller.home.glob("snapshots/.*")) == []


@pytest.mark.parametrize("has_pieces", [True, False], ids=["pieces", "digest only"])
def test_an_http_pull_killed_ten_times_ends_exact_and_fetches_nothing_twice_beyond_a_batch(
    puller: Puller, tmp_path: Path, has_pieces: bool
) -> None:
    # Without piece hashes the grid is our own, of 4 MiB: then a piece, not a batch, is what a kill may cost.
    piece = PIECE if has_pieces else 4 * MIB
    weights = random.Random(31).randbytes(48 * MIB + 12_345)
    publisher = PublisherSimulator({"weights.bin": weights, "config.json": b"{}"})
    size = sum(map(len, publisher.files.values()))
    manifest = publisher.manifest(piece_length=PIECE if has_pieces else None)
    rate = 24 * MIB
    with MirrorSimulator(publisher.files, rate_bytes_per_second=rate, send_buffer_bytes=128 * KIB) as mirror:
        entries = publisher.manifest([mirror.base_url], piece_length=PIECE if has_pieces else None)
        (tmp_path / "model.meta4").write_bytes(serialise_metalink(entries))
        assert manifest.content_digest() == entries.content_digest()

        def start() -> subprocess.Popen[str]:
            return start_pull(puller.home, str(tmp_path / "model.meta4"))

        hits = kill_at_random(start, mirror.bytes_sent, size, seed=1)
        mirror.rate_bytes_per_second = None
        result = finish(start())
        # One batch, the piece begun, and what was on its way in the sockets.
        lost_per_kill = max(BATCH, piece) + piece + MIB
        sent = mirror.bytes_sent()
    assert hits >= KILLS - 2
    assert_exact(puller, result, publisher)
    assert size <= sent <= size + hits * lost_per_kill


@pytest.mark.parametrize("pins", ["pieces", "sha256"])
def test_a_pull_over_several_connections_killed_twenty_times_ends_exact_and_fetches_little_twice(
    puller: Puller, tmp_path: Path, pins: str
) -> None:
    publisher = PublisherSimulator({"weights.bin": random.Random(33).randbytes(64 * MIB + 12_345), "c.json": b"{}"})
    size = sum(map(len, publisher.files.values()))
    engine.write_one_certificate(tmp_path / "one.pem")
    # Of each of the three connections: slow enough that every kill meets a transfer.
    options = {"rate_bytes_per_second": 12 * MIB, "send_buffer_bytes": engine.SEND_BUFFER}
    with MirrorSimulator(publisher.files, **options) as mirror:  # type: ignore[arg-type]
        manifest = processes.write_manifest(tmp_path / "model.meta4", publisher, [mirror], pins)

        def start() -> subprocess.Popen[str]:
            certificate, connections = str(tmp_path / "one.pem"), str(engine.CONNECTIONS)
            environment = {"SSL_CERT_FILE": certificate, "MISTRAL_FETCH_CONNECTIONS": connections}
            return processes.start_pull(puller.home, manifest, environment=environment)

        hits = kill_at_random(start, mirror.bytes_sent, size, seed=3, kills=20)
        mirror.rate_bytes_per_second = None
        code, result, err = processes.result_of(start())
        sent, most_at_once = mirror.bytes_sent(), mirror.most_requests_at_once
    assert code == 0, err
    assert hits >= 18
    assert most_at_once > 1
    assert_exact(puller, result, publisher)
    # What a kill may cost: a batch that was written and not recorded yet; and of each connection what had not become
    # a whole piece, or was counted by the mirror and still lay in the sockets (twice the buffer asked for, on Linux).
    # All twenty together are well below what it would cost to begin anew after each.
    in_flight = engine.CONNECTIONS * (engine.PIECE + 2 * engine.SEND_BUFFER)
    assert size <= sent <= 1.02 * size + hits * (engine.BATCH + in_flight)
    print(f"{hits} kills of {pins}: {(sent - size) / hits / engine.BATCH:.2f} batches fetched again at each")


@pytest.mark.swarm
def test_a_torrent_pull_killed_ten_times_ends_exact_and_fetches_nothing_twice_beyond_a_batch(
    puller: Puller, tmp_path: Path
) -> None:
    publisher = PublisherSimulator({"weights.bin": random.Random(32).randbytes(48 * MIB + 54_321), "c.json": b"{}"})
    size = sum(map(len, publisher.files.values()))
    publication = publisher.publish(tmp_path / "published")
    metainfo = parse_metainfo(publication.torrent_path.read_bytes())
    settings = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, uploads=True)
    seeder = Seeder(metainfo, tmp_path / "published" / "model", settings, rate_bytes_per_second=16 * MIB)
    seeder.wait_until_seeding(30)

    def start() -> subprocess.Popen[str]:
        peer = f"127.0.0.1:{seeder.port}"
        return start_pull(puller.home, "--via", "torrent", "--peer", peer, str(publication.torrent_path))

    try:
        hits = kill_at_random(start, lambda: seeder.uploaded_bytes, size, seed=2)
        result = finish(start())
        sent = seeder.uploaded_bytes
    finally:
        seeder.close()
    assert hits >= KILLS - 2
    assert_exact(puller, result, publisher)
    # What libtorrent had asked for and not yet written: far less than our own batch.
    assert size <= sent <= size + hits * 2 * MIB
