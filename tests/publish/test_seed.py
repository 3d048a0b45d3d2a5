"""Seeding as a service: both torrents, right pieces only, changes noticed, limits kept, ports told."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from mistral_fetch.bittorrent.station import SeedLimits
from mistral_fetch.errors import ExitCode, ListenRefused, PieceMismatch
from mistral_fetch.publish.seed import bad_spans
from tests.publish.conftest import FILES, wait_until

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(60)]
SIZE = sum(FILES.values())


@pytest.mark.parametrize("which", [0, 1], ids=["hybrid", "v1"])
def test_both_torrents_are_seeded_on_one_port(world, seed, leech, which):
    running = seed()
    ready = running.wait_ready()
    assert (ready.size, ready.offered_bytes) == (SIZE, SIZE)
    torrent = world.torrents[which]
    peer = leech(torrent, ready.port)
    wait_until(lambda: len(peer.pieces()) == torrent.piece_count)
    assert f"x.pe=127.0.0.1:{ready.port}" in ready.magnet
    assert torrent.info_hash in (ready.magnet, ready.plain_magnet)[which]
    running.stopped.set()
    ended = running.join()
    assert ended.reason == "stopped"
    assert ended.uploaded_bytes >= SIZE


@pytest.mark.parametrize("which", [0, 1], ids=["hybrid", "v1"])
def test_wrong_pieces_are_named_and_never_sent(world, seed, leech, which):
    world.spoil(at=700_000)
    running = seed()
    ready = running.wait_ready()
    torrent = world.torrents[which]
    spans = {i: bad_spans(torrent, [i]).get("weights.bin", []) for i in range(torrent.piece_count)}
    spoilt = {index for index, found in spans.items() if any(span.start <= 700_000 < span.end for span in found)}
    assert len(spoilt) == 1
    assert ready.offered_bytes == SIZE - torrent.piece_length
    assert [line for line in running.notices if line.startswith("weights.bin is wrong at bytes [")]
    assert running.seeding.metrics.snapshot()["verify_failures"]["piece"] == 2
    peer = leech(torrent, ready.port)
    wait_until(lambda: peer.pieces() == set(range(torrent.piece_count)) - spoilt)
    assert peer.failed == []


def test_strict_refuses_a_model_with_a_wrong_piece(world, seed):
    world.spoil()
    running = seed(is_strict=True)
    running.join()
    assert isinstance(running.error, PieceMismatch)
    assert running.error.exit_code == ExitCode.INTEGRITY
    assert "weights.bin" in running.error.what
    assert running.ready is None


def test_a_directory_without_one_right_piece_is_refused(world, seed):
    for path in FILES:
        (world.directory / path).unlink()
    running = seed()
    running.join()
    assert isinstance(running.error, PieceMismatch)


@pytest.mark.parametrize("how", ["in place", "replaced", "truncated"])
def test_a_file_that_changes_is_not_offered_any_more(world, seed, leech, how):
    running = seed(watch_seconds=0.05)
    ready = running.wait_ready()
    metrics = running.seeding.metrics
    if how == "in place":
        world.spoil()
    elif how == "replaced":
        new = world.directory.parent / "new"
        new.write_bytes(bytes(FILES["weights.bin"]))
        new.replace(world.directory / "weights.bin")
    else:
        os.truncate(world.directory / "weights.bin", 1000)
    wait_until(lambda: metrics.is_ready and metrics.present_bytes < SIZE)
    assert any("weights.bin changed on the disk" in line for line in running.notices)
    assert metrics.snapshot()["verify_failures"]["file"] >= 1
    peer = leech(world.torrents[0], ready.port)
    small = {i for i in range(world.torrents[0].piece_count) if "params.json" in bad_spans(world.torrents[0], [i])}
    wait_until(lambda: peer.pieces() >= small)
    assert peer.failed == []
    world.mend()
    wait_until(lambda: metrics.is_ready and metrics.present_bytes == SIZE)
    wait_until(lambda: len(peer.pieces()) == world.torrents[0].piece_count)


def test_the_ratio_ends_it(world, seed, leech):
    running = seed(ratio=1.0)
    ready = running.wait_ready()
    peer = leech(world.torrents[0], ready.port)
    wait_until(lambda: len(peer.pieces()) >= 1)
    ended = running.join()
    assert (ended.reason, ended.uploaded_bytes >= SIZE) == ("ratio", True)


def test_the_duration_ends_it(seed):
    assert seed(duration_seconds=0.0).join().reason == "duration"


def test_the_limit_binds_peers_on_this_machine_too(world, seed, leech):
    running = seed(limits=SeedLimits(rate_bytes_per_second=600_000))
    ready = running.wait_ready()
    began = time.monotonic()
    peer = leech(world.torrents[0], ready.port)
    wait_until(lambda: len(peer.pieces()) == world.torrents[0].piece_count)
    assert time.monotonic() - began > 1.0


def test_an_explicit_port_in_use_is_refused(seed):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = seed(listen=f"127.0.0.1:{port}")
        running.join()
    assert isinstance(running.error, ListenRefused)
    assert running.error.exit_code == ExitCode.LOCKED
    assert str(port) in running.error.what


def test_of_a_range_the_next_port_is_taken_and_said_once(seed):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = seed(listen=f"127.0.0.1:{port}-{min(port + 20, 65535)}")
        ready = running.wait_ready()
    assert ready.port != port
    assert [line for line in running.notices if f"port {port} is in use; listening on {ready.port}" in line] != []
    assert len(running.notices) == len(set(running.notices))


def test_systemd_hears_of_start_readiness_and_end(seed, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        name = f"\0mistral-fetch-test-{os.getpid()}-{threading.get_native_id()}"
        supervisor.bind(name)
        supervisor.settimeout(20)
        environment = {"NOTIFY_SOCKET": f"@{name[1:]}", "WATCHDOG_USEC": "200000", "WATCHDOG_PID": str(os.getpid())}
        running = seed(environment=environment)
        running.wait_ready()
        heard = []
        while "WATCHDOG=1" not in heard or not any(text.startswith("READY=1\nSTATUS=seeding tiny") for text in heard):
            heard.append(supervisor.recv(4096).decode())
        running.stopped.set()
        while heard[-1] != "STOPPING=1":
            heard.append(supervisor.recv(4096).decode())
