"""The swarm as a source: exact bytes, nothing twice, no silence without end, and liars named."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import libtorrent as lt
import pytest

from mistral_fetch.bittorrent.alerts import PeerBanned
from mistral_fetch.bittorrent.bencode import encode
from mistral_fetch.bittorrent.client import Download
from mistral_fetch.bittorrent.create import TorrentAddresses, hybrid_torrent, plain_torrent, tree_order
from mistral_fetch.bittorrent.magnet import Magnet
from mistral_fetch.bittorrent.metainfo import Metainfo, parse_metainfo, wrap_info
from mistral_fetch.bittorrent.peers import parse_peer
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import (
    ExitCode,
    IntegrityError,
    Interrupted,
    MetadataTimeout,
    NoPeers,
    PieceMismatch,
    Stalled,
    TorrentMismatch,
    UnsafePath,
)
from mistral_fetch.events import (
    BytesDropped,
    BytesReceived,
    Notice,
    Progress,
    SourceConnected,
    SourceFailed,
    SourceLied,
)
from mistral_fetch.manifest import FileEntry
from mistral_fetch.publish.hashing import SourceFile, hash_files
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.swarm import SwarmSource, fetch_metadata
from mistral_fetch.store.partials import Partial

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(60)]

KIB = 1024
PIECE = 64 * KIB
FILES = {
    "consolidated.00.pth": 3_000_017,
    "params.json": 600,
    "tokenizer.model": 493_443,
    "nested/deep/x": 70_001,
    "empty": 0,
}
SIZE = sum(FILES.values())
# Pad files of a hybrid are asked for like any bytes; at most a piece for each file.
PADDING = len(FILES) * PIECE
# Pieces begun and not finished when a process is killed; what the sockets held counts as sent, too.
OPEN_PIECES = 2
LOOPBACK = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, no_peers_timeout_seconds=5)


def content(path):
    return hashlib.shake_128(path.encode()).digest(FILES[path])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("publisher") / "model"
    for path in FILES:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content(path))
    return directory


@pytest.fixture(scope="module")
def torrents(model):
    files = [SourceFile(path, size, model / path) for path, size in FILES.items()]
    hashed = hash_files(files, PIECE, max(FILES, key=tree_order), lambda _path, _done: None)
    hybrid = hybrid_torrent("model", PIECE, [file.torrent for file in hashed.files], TorrentAddresses())
    plain = plain_torrent("model", PIECE, hashed.plain_order, hashed.plain_pieces, TorrentAddresses())
    return {"v1": parse_metainfo(plain), "hybrid": parse_metainfo(hybrid)}


@pytest.fixture(params=["v1", "hybrid"])
def torrent(request, torrents):
    return torrents[request.param]


class Seeds:
    """Starts seeders in this process; they end with the test."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.running: list[Seeder] = []

    def __call__(self, metainfo: Metainfo, directory: Path | None = None, listen="127.0.0.1:0", **options) -> str:
        settings = replace(LOOPBACK, listen_interfaces=listen, uploads=True)
        seeder = Seeder(metainfo, directory or self.model, settings, **options)
        seeder.wait_until_seeding(10)
        self.running.append(seeder)
        return f"127.0.0.1:{seeder.port}"

    @property
    def uploaded_bytes(self) -> int:
        return sum(seeder.uploaded_bytes for seeder in self.running)


@pytest.fixture
def seed(model):
    seeds = Seeds(model)
    yield seeds
    for seeder in seeds.running:
        seeder.close()


class Leech:
    """A place to download to, and what was said on the way."""

    def __init__(self, directory: Path, paths=tuple(FILES)) -> None:
        self.directory = directory
        self.paths = paths
        self.events: list[object] = []
        self.stop = StopSignal()

    def target(self, path, size=None) -> Target:
        size = FILES[path] if size is None else size
        return Target(FileEntry(path, size), Partial(self.directory / "partial" / path.replace("/", "-"), size))

    def fetch(self, torrent: Metainfo | Magnet, *peers: str, **settings) -> SwarmSource:
        self.events.clear()
        source = SwarmSource(torrent, replace(LOOPBACK, peers=peers, **settings), self.directory / "state")
        source.fetch([self.target(path) for path in self.paths], self.events.append, self.stop)
        return source

    def data(self, path) -> Path:
        return self.target(path).partial.data_path

    def of_kind(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def received_bytes(self):
        return sum(event.length for event in self.of_kind(BytesReceived))

    def assert_exact(self):
        for path in self.paths:
            assert self.data(path).read_bytes() == content(path), path


@pytest.fixture
def leech(tmp_path):
    return Leech(tmp_path)


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_fetch_brings_every_file_exactly(leech, seed, torrent):
    source = leech.fetch(torrent, seed(torrent))
    leech.assert_exact()
    assert SIZE <= leech.received_bytes <= SIZE + PADDING
    assert {event.path: event.present_bytes for event in leech.of_kind(Progress)} == FILES
    assert leech.of_kind(SourceConnected)[0].peers == 1
    assert source.label.startswith(f"torrent {torrent.info_hash[:8]}")
    assert source.assurance == (Assurance.BTV2 if torrent.info_hash_v2 else Assurance.BTV1)


def test_nothing_is_uploaded_unless_asked(tmp_path, seed, torrents):
    """One leech has everything and stays; another, with nobody else to ask, gets nothing from it."""
    torrent = torrents["v1"]
    first, second = Leech(tmp_path / "first"), Leech(tmp_path / "second")
    slow = seed(torrent, rate_bytes_per_second=100 * KIB)
    port = int(closed_port().rpartition(":")[2])
    running = threading.Thread(
        target=_fetch_until_stopped,
        args=(first, torrent, slow, {"listen_interfaces": f"127.0.0.1:{port}", "incoming": True}),
    )
    running.start()
    try:
        wait_for(lambda: first.received_bytes > 300 * KIB)
        with pytest.raises(Stalled) as caught:
            second.fetch(torrent, f"127.0.0.1:{port}", stall_timeout_seconds=2)
        assert caught.value.exit_code == ExitCode.STALLED
        assert second.received_bytes == 0
    finally:
        first.stop.set()
        running.join()


def test_second_fetch_asks_nobody(leech, seed, torrent):
    leech.fetch(torrent, seed(torrent))
    leech.fetch(torrent)
    leech.assert_exact()
    assert leech.received_bytes == 0


def test_magnet_is_fetched_by_metadata_first(leech, seed, torrent):
    peer = seed(torrent)
    magnet = Magnet(torrent.info_hash_v1, torrent.info_hash_v2, peers=(peer,), repairs=("mended it",))
    source = leech.fetch(magnet)
    leech.assert_exact()
    assert any("mended it" in event.text for event in leech.of_kind(Notice))
    assert source.metainfo(leech.events.append, leech.stop).files == torrent.files
    # A later process needs nobody to know what it has.
    leech.fetch(replace(magnet, peers=()))
    assert leech.received_bytes == 0


def test_magnet_by_v1_hash_alone_finds_a_hybrid(leech, seed, torrents):
    torrent = torrents["hybrid"]
    source = leech.fetch(Magnet(torrent.info_hash_v1, None), seed(torrent))
    leech.assert_exact()
    assert source.assurance == Assurance.BTV1  # SHA-1 alone vouches for the v2 hashes


def test_magnet_with_both_hashes_proves_what_the_stronger_does(leech, seed, torrents):
    torrent = torrents["hybrid"]
    source = leech.fetch(Magnet(torrent.info_hash_v1, torrent.info_hash_v2), seed(torrent))
    leech.assert_exact()
    assert source.assurance == Assurance.BTV2


def test_hostile_metadata_writes_nothing(leech, tmp_path):
    info = encode(
        {
            b"name": b"model",
            b"piece length": 16384,
            b"pieces": bytes(20),
            b"files": [{b"path": [b"..", b"..", b"evil"], b"length": 5}, {b"path": [b"..", b"empty"], b"length": 0}],
        }
    )
    session = lt.session(
        {"listen_interfaces": "127.0.0.1:0", "enable_dht": False, "enable_lsd": False, "alert_mask": 0}
    )
    parameters = lt.load_torrent_buffer(wrap_info(info))
    parameters.save_path = str(tmp_path / "hostile")
    session.add_torrent(parameters)
    magnet = Magnet(hashlib.sha1(info).hexdigest(), None, peers=(f"127.0.0.1:{session.listen_port()}",))
    with pytest.raises(UnsafePath):
        leech.fetch(magnet)
    assert not list(leech.directory.rglob("*evil*"))
    assert not (leech.directory / "state").exists()


def test_magnet_nobody_answers_ends_in_time(leech):
    began = time.monotonic()
    with pytest.raises(MetadataTimeout) as caught:
        leech.fetch(Magnet("1" * 40, None), closed_port(), no_peers_timeout_seconds=1)
    assert caught.value.exit_code == ExitCode.NO_SOURCE
    assert time.monotonic() - began < 5


def test_magnet_wait_can_be_stopped():
    stop = StopSignal()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Interrupted):
        fetch_metadata(Magnet("1" * 40, None), replace(LOOPBACK, peers=(closed_port(),)), stop, lambda _event: None)


def test_unwanted_files_do_not_appear(tmp_path, seed, torrent):
    leech = Leech(tmp_path, paths=("params.json", "nested/deep/x"))
    leech.fetch(torrent, seed(torrent))
    leech.assert_exact()
    names = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert names <= {"partial", "state"}
    assert sorted(path.name for path in (tmp_path / "partial").iterdir()) == ["nested-deep-x", "params.json"]
    kept = sum(path.stat().st_size for path in (tmp_path / "state").rglob("*") if path.is_file())
    assert kept < 8 * PIECE
    assert leech.received_bytes < 8 * PIECE


def test_interrupted_fetch_goes_on_where_it_was(leech, seed, torrent):
    slow = seed(torrent, rate_bytes_per_second=1_500_000)
    _stop_after(leech, SIZE // 3)
    with pytest.raises(Interrupted):
        leech.fetch(torrent, slow)
    assert (leech.directory / "state" / "clean-stop.json").exists()
    first = leech.received_bytes
    assert SIZE // 3 <= first < SIZE
    leech.stop = StopSignal()
    leech.fetch(torrent, seed(torrent))
    leech.assert_exact()
    assert not any("checking" in event.text for event in leech.of_kind(Notice))
    assert first + leech.received_bytes <= SIZE + PADDING + 4 * PIECE


def test_stop_is_heard_promptly(leech, seed, torrents):
    slow = seed(torrents["v1"], rate_bytes_per_second=300_000)
    heard: list[float] = []

    def report(event):
        leech.events.append(event)
        if isinstance(event, BytesReceived) and not heard:
            heard.append(time.monotonic())
            leech.stop.set()

    source = SwarmSource(torrents["v1"], replace(LOOPBACK, peers=(slow,)), leech.directory / "state")
    with pytest.raises(Interrupted):
        source.fetch([leech.target(path) for path in FILES], report, leech.stop)
    assert time.monotonic() - heard[0] < 3


def test_flipped_byte_after_a_clean_stop_is_fetched_again(leech, seed, torrent):
    leech.fetch(torrent, seed(torrent))
    with leech.data("consolidated.00.pth").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))
    leech.fetch(torrent, seed(torrent))
    leech.assert_exact()
    assert 0 < leech.received_bytes <= 2 * PIECE


def test_bytes_another_source_left_are_found(leech, seed, torrent):
    target = leech.target("consolidated.00.pth")
    target.partial.prepare()
    good = content("consolidated.00.pth")
    with target.partial.data_path.open("r+b") as file:
        file.write(good[: 20 * PIECE])
        file.seek(40 * PIECE)
        file.write(bytes(PIECE))
    leech.fetch(torrent, seed(torrent))
    leech.assert_exact()
    assert leech.received_bytes <= SIZE + PADDING - 18 * PIECE


def test_record_of_a_clean_stop_is_not_believed_for_other_files(leech, seed, torrent):
    leech.fetch(torrent, seed(torrent))
    data = leech.data("consolidated.00.pth")
    changed = data.stat()
    data.write_bytes(bytes(FILES["consolidated.00.pth"]))
    os.utime(data, ns=(changed.st_atime_ns, changed.st_mtime_ns + 1))
    leech.fetch(torrent, seed(torrent))
    leech.assert_exact()


def test_kill_nine_loses_no_verified_piece(tmp_path, seed, torrents):
    """A process killed at ten random moments: the end is exact, and only pieces that were open are fetched again."""
    torrent = torrents["v1"]
    (tmp_path / "t.torrent").write_bytes(torrent.data)
    slow = seed(torrent, rate_bytes_per_second=800_000)
    dice = random.Random(7)
    for _ in range(10):
        _run_and_kill(tmp_path, slow, dice.uniform(0, 0.3))
    assert seed.uploaded_bytes > SIZE // 3
    leech = Leech(tmp_path)
    leech.fetch(torrent, seed(torrent))
    leech.assert_exact()
    assert leech.received_bytes < SIZE * 2 // 3
    assert seed.uploaded_bytes <= SIZE + 10 * OPEN_PIECES * PIECE


CHILD = """
import resource, sys
from mistral_fetch.errors import MistralFetchError
sys.path.insert(0, {tests!r})
from test_swarm import *
leech = Leech(Path({directory!r}))
leech.events = Announcing()
for path in leech.paths:
    leech.target(path).partial.prepare()
if {file_limit!r}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({file_limit!r}, {file_limit!r}))
try:
    leech.fetch(parse_metainfo(Path({torrent!r}).read_bytes()), {peer!r})
except MistralFetchError as error:
    print(error.kind)
    sys.exit(error.exit_code)
"""


def child(tmp_path, peer, file_limit=0):
    """Return a fetch in a process of its own, not yet waited for; no file may grow beyond ``file_limit``."""
    code = CHILD.format(
        tests=str(Path(__file__).parent),
        directory=str(tmp_path),
        torrent=str(tmp_path / "t.torrent"),
        peer=peer,
        file_limit=file_limit,
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


class Announcing(list):
    """Says that bytes came in, so that the parent knows when to begin to wait."""

    def append(self, event):
        if isinstance(event, BytesReceived):
            print(event.length, flush=True)


def _run_and_kill(tmp_path, peer, seconds):
    with child(tmp_path, peer) as process:
        assert process.stdout.readline(), process.stderr.read().decode()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)


def test_disk_that_takes_no_more_is_not_called_success(tmp_path, seed, torrent):
    """libtorrent calls a piece done before it is on the disk, so a small file's failure comes after the finish."""
    (tmp_path / "t.torrent").write_bytes(torrent.data)
    peer = seed(torrent)
    for limit in (SIZE // 4, FILES["consolidated.00.pth"] - 1):
        with child(tmp_path, peer, file_limit=limit) as process:
            output, errors = process.communicate(timeout=30)
        assert (process.returncode, output.split()[-1:]) == (ExitCode.DISK, [b"out-of-space"]), errors.decode()
    leech = Leech(tmp_path)
    leech.fetch(torrent, peer)
    leech.assert_exact()


def test_dead_swarm_ends_in_time(leech, torrent):
    began = time.monotonic()
    with pytest.raises(NoPeers) as caught:
        leech.fetch(torrent, closed_port(), no_peers_timeout_seconds=1)
    assert caught.value.exit_code == ExitCode.NO_SOURCE
    assert 1 <= time.monotonic() - began < 5


def test_peer_that_accepts_and_says_nothing_is_no_peer(leech, torrents):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(NoPeers):
        leech.fetch(torrents["v1"], f"127.0.0.1:{silent.getsockname()[1]}", no_peers_timeout_seconds=2)


def test_nobody_to_ask_ends_at_once(leech, torrents):
    began = time.monotonic()
    with pytest.raises(NoPeers):
        leech.fetch(torrents["v1"], no_peers_timeout_seconds=30)
    assert time.monotonic() - began < 5


def test_seed_that_comes_late_is_found(leech, seed, torrents):
    peer = closed_port()
    timer = threading.Timer(1.0, seed, (torrents["v1"],), {"listen": peer})
    timer.start()
    leech.fetch(torrents["v1"], peer, no_peers_timeout_seconds=15)
    timer.join()
    leech.assert_exact()


@pytest.mark.parametrize("size", [599, 601])
def test_torrent_of_other_sizes_is_refused(leech, torrents, size):
    source = SwarmSource(torrents["v1"], LOOPBACK, leech.directory / "state")
    with pytest.raises(TorrentMismatch, match=r"params\.json") as caught:
        source.fetch([leech.target("params.json", size)], leech.events.append, leech.stop)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert f"expected {size} bytes, got 600 bytes" in caught.value.detail
    assert not (leech.directory / "partial").exists()


def test_torrent_without_the_file_is_refused(leech, torrents):
    source = SwarmSource(torrents["v1"], LOOPBACK, leech.directory / "state")
    with pytest.raises(TorrentMismatch, match=r"model\.safetensors") as caught:
        source.fetch([leech.target("model.safetensors", 5)], leech.events.append, leech.stop)
    assert "no file of that name" in caught.value.detail


@pytest.fixture
def corrupt_model(tmp_path, model):
    """The model's files with a wrong byte in every piece."""
    directory = tmp_path / "corrupt"
    for path, size in FILES.items():
        data = bytearray(content(path))
        for at in range(0, size, PIECE // 4):
            data[at] ^= 0xFF
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return directory


def test_liar_is_named_and_the_honest_seed_goes_on(leech, seed, torrent, corrupt_model):
    liar = seed(torrent, corrupt_model, skips_checks=True)
    honest = seed(
        torrent, rate_bytes_per_second=1_000_000
    )  # slow enough for the liar to be asked too, on a busy machine
    leech.fetch(torrent, liar, honest, no_peers_timeout_seconds=20)
    leech.assert_exact()
    lies = leech.of_kind(SourceLied)
    assert {lie.source for lie in lies} == {f"peer {liar}"}
    assert lies[0].path in FILES
    assert "piece" in lies[0].where
    assert leech.of_kind(BytesDropped)


def test_liars_alone_are_an_integrity_error(leech, seed, torrent, corrupt_model):
    liar = seed(torrent, corrupt_model, skips_checks=True)
    with pytest.raises(PieceMismatch) as caught:
        leech.fetch(torrent, liar, no_peers_timeout_seconds=3)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert liar in caught.value.what
    assert isinstance(caught.value, IntegrityError)


def test_honest_seed_that_was_banned_too_is_asked_again(leech, seed, torrent, monkeypatch):
    """What libtorrent does when an honest peer had a part in several failed pieces; here it does so at once."""
    honest = seed(torrent)
    start = Download.start

    def start_banned(download, peers):
        parameters = download._parameters

        def with_ban():
            first = parameters()
            first.banned_peers = [parse_peer(honest)]
            monkeypatch.undo()
            return first

        monkeypatch.setattr(download, "_parameters", with_ban)
        start(download, peers)
        download._waiting.append(PeerBanned(honest))

    monkeypatch.setattr(Download, "start", start_banned)
    leech.fetch(torrent, honest, no_peers_timeout_seconds=10)
    leech.assert_exact()
    assert any("asking it again" in event.text for event in leech.of_kind(Notice))
    assert not leech.of_kind(SourceLied)


def test_web_seed_is_asked_under_the_torrents_own_names(leech, model, torrent):
    """The files lie elsewhere here; the addresses asked for must not change with that."""
    with MirrorSimulator(model.parent) as mirror:
        leech.fetch(replace(torrent, web_seeds=(f"{mirror.base_url}/",)))
        asked = {request.path for request in mirror.requests()}
    leech.assert_exact()
    assert "/model/consolidated.00.pth" in {"/" + path.lstrip("/") for path in asked}


def test_what_a_web_seed_says_of_itself_cannot_move_the_cursor(leech, torrents):
    status = b"HTTP/1.1 404 \x1b[31mEVIL\x1b]0;title\x07\r\nContent-Length: 0\r\n\r\n"

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(status)
            connection.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        seed = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with pytest.raises((NoPeers, Stalled)):
            leech.fetch(replace(torrents["v1"], web_seeds=(seed,)), no_peers_timeout_seconds=3, stall_timeout_seconds=3)
        thread.join()
    reasons = [event.reason for event in leech.of_kind(SourceFailed)]
    assert any("EVIL" in reason for reason in reasons)
    assert all(reason.isprintable() for reason in reasons)


def test_seeder_process_is_ready_and_ends(tmp_path, model, torrents, leech):
    (tmp_path / "t.torrent").write_bytes(torrents["v1"].data)
    command = [sys.executable, "-m", "mistral_fetch.simulators.seeder", "--torrent", str(tmp_path / "t.torrent")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [*command, "--dir", str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        ready = json.loads(process.stdout.readline())
        leech.fetch(torrents["v1"], f"127.0.0.1:{ready['port']}")
        process.stdin.close()
        assert process.wait(10) == 0
    assert ready["info_hash"] == torrents["v1"].info_hash_v1
    leech.assert_exact()


def test_seeder_refuses_files_that_are_not_the_torrents(tmp_path, corrupt_model, torrents):
    seeder = Seeder(torrents["v1"], corrupt_model, LOOPBACK)
    with pytest.raises(IntegrityError):
        seeder.wait_until_seeding(10)
    seeder.close()
    assert (corrupt_model / "params.json").read_bytes() != content("params.json")


def wait_for(condition, timeout_seconds=10):
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _fetch_until_stopped(leech, torrent, peer, settings):
    with pytest.raises(Interrupted):
        leech.fetch(torrent, peer, **settings)


def _stop_after(leech, length):
    def watch():
        wait_for(lambda: leech.received_bytes >= length)
        leech.stop.set()

    threading.Thread(target=watch).start()


def test_a_finished_file_that_changed_on_the_disk_is_found_and_fetched_again(torrent, seed, leech, monkeypatch):
    honest = Download.flush
    spoiled: list[int] = []

    def spoil_once(download: Download) -> bool:
        is_flushed = honest(download)
        if not spoiled:
            path = leech.target("consolidated.00.pth").partial.data_path
            with path.open("r+b") as file:
                file.seek(1_000_000)
                file.write(b"\0" * 8)
            spoiled.append(1)
        return is_flushed

    monkeypatch.setattr(Download, "flush", spoil_once)
    leech.fetch(torrent, seed(torrent))
    assert spoiled
    leech.assert_exact()
    assert any("changed the files" in event.text for event in leech.of_kind(Notice))


def test_files_with_a_sha256_of_their_own_are_left_to_the_store(torrent, seed, leech, monkeypatch):
    monkeypatch.setattr(Download, "recheck", lambda _download: pytest.fail("the store reads them anyway"))
    targets = []
    for path in FILES:
        digest = Digest("sha256", hashlib.sha256(content(path)).hexdigest())
        target = leech.target(path)
        targets.append(Target(replace(target.entry, digests=(digest,)), target.partial))
    source = SwarmSource(torrent, replace(LOOPBACK, peers=(seed(torrent),)), leech.directory / "state")
    source.fetch(targets, leech.events.append, leech.stop)
    leech.assert_exact()
