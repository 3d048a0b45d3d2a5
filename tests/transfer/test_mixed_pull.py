"""Mirrors and a swarm at once: both are used, neither waits for the other, and no liar gets anything through."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.errors import AllSourcesFailed
from mistral_fetch.events import BytesReceived, Notice, SourceConnected, SourceFailed, SourceLied
from mistral_fetch.manifest import Manifest, TorrentLink
from mistral_fetch.publish.build import Publication
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from tests.transfer.conftest import Puller

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(90)]

KIB = 1024
SIZE = 6_000_000
MODEL = PublisherSimulator({"a/weights.bin": random.Random(41).randbytes(SIZE), "b.json": b"{}", "empty": b""})
TORRENTS = ("model.torrent", "model.v1.torrent")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Publication:
    return MODEL.publish(tmp_path_factory.mktemp("publisher"))


@contextmanager
def seeding(torrent: Path, rate: int | None = None, directory: Path | None = None) -> Iterator[str]:
    settings = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, uploads=True)
    where = directory or torrent.parent / "model"
    seeder = Seeder(parse_metainfo(torrent.read_bytes()), where, settings, rate_bytes_per_second=rate)
    try:
        seeder.wait_until_seeding(30)
        yield f"127.0.0.1:{seeder.port}"
    finally:
        seeder.close()


@contextmanager
def serving(published: Publication, torrents: Sequence[str] = TORRENTS, **options: float) -> Iterator[MirrorSimulator]:
    """Serve a manifest with fine pieces, whose torrents lie beside it."""
    manifest = with_torrents(MODEL.manifest(), torrents)
    with MODEL.serve(manifest, **options) as mirror:
        assert isinstance(mirror.files, dict)
        for name in TORRENTS:
            mirror.files[name] = (published.torrent_path.parent / name).read_bytes()
        yield mirror


def with_torrents(manifest: Manifest, names: Sequence[str]) -> Manifest:
    return manifest.with_files(
        replace(entry, torrents=tuple(TorrentLink(name, f"model/{entry.path}", ".v1." not in name) for name in names))
        for entry in manifest.files
    )


def sources_of(directory: Path, path: str) -> list[str]:
    record = json.loads((directory / "PROVENANCE.json").read_text())
    return [str(source) for file in record["files"] if file["path"] == path for source in file["sources"]]


def unused_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return int(closed.getsockname()[1])


@pytest.mark.parametrize("torrents", [TORRENTS[:1], TORRENTS[1:]], ids=["hybrid", "v1"])
def test_mirror_and_swarm_fill_one_file_together(
    puller: Puller, published: Publication, torrents: Sequence[str]
) -> None:
    torrent = published.torrent_path.parent / torrents[0]
    with (
        seeding(torrent, rate=2_000_000) as peer,
        serving(published, torrents, rate_bytes_per_second=400_000) as mirror,
    ):
        result = puller(mirror.url("model.meta4"), peers=(peer,), connections=2)
        sent = mirror.bytes_sent("model/a/weights.bin")
    puller.assert_exact(result, MODEL)
    assert 0 < sent < SIZE
    found = sources_of(result.directory, "a/weights.bin")
    assert len(found) == 2, found
    assert any(source.startswith("torrent ") for source in found)
    assert result.received_bytes <= SIZE + 2 + 20 * 64 * KIB, "some pieces may be raced for, not many"
    assert result.assurance == "sha256"


def test_a_dead_swarm_costs_no_time(puller: Puller, published: Publication) -> None:
    with serving(published, rate_bytes_per_second=3_000_000) as mirror:
        began = time.monotonic()
        result = puller(mirror.url("model.meta4"), peers=(f"127.0.0.1:{unused_port()}",), peer_timeout=60.0)
        assert time.monotonic() - began < 10
    puller.assert_exact(result, MODEL)
    assert puller.of_kind(SourceFailed) == [], "nobody missed it"


def test_a_dead_mirror_leaves_it_to_the_swarm(puller: Puller, published: Publication) -> None:
    with seeding(published.torrent_path) as peer, serving(published) as mirror:
        for path in MODEL.files:
            mirror.always(f"model/{path}", Fault(status=404))
        result = puller(mirror.url("model.meta4"), peers=(peer,), peer_timeout=20.0)
    puller.assert_exact(result, MODEL)
    assert all(source.startswith("torrent ") for source in sources_of(result.directory, "a/weights.bin"))


def when(condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_what_a_dying_mirror_leaves_the_swarm_brings(puller: Puller, published: Publication) -> None:
    with seeding(published.torrent_path) as peer, serving(published, rate_bytes_per_second=500_000) as mirror:

        def die() -> None:
            mirror.rule = lambda _request: Fault(status=404)

        when(lambda: mirror.bytes_sent("model/a/weights.bin") > 300_000, die)
        result = puller(mirror.url("model.meta4"), peers=(peer,), peer_timeout=20.0)
    puller.assert_exact(result, MODEL)


def test_what_a_dying_swarm_leaves_the_mirror_brings(puller: Puller, published: Publication) -> None:
    settings = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, uploads=True)
    metainfo = parse_metainfo(published.torrent_path.read_bytes())
    seeder = Seeder(metainfo, published.torrent_path.parent / "model", settings, rate_bytes_per_second=1_000_000)
    seeder.wait_until_seeding(30)
    with serving(published, rate_bytes_per_second=300_000) as mirror:
        when(lambda: seeder.uploaded_bytes > 500_000, seeder.close)
        result = puller(mirror.url("model.meta4"), peers=(f"127.0.0.1:{seeder.port}",), peer_timeout=60.0)
    puller.assert_exact(result, MODEL)
    assert len(sources_of(result.directory, "a/weights.bin")) == 2


def test_a_lying_mirror_is_named_and_the_swarm_goes_on(puller: Puller, published: Publication) -> None:
    with seeding(published.torrent_path) as peer, serving(published, rate_bytes_per_second=2_000_000) as mirror:
        mirror.always("model/a/weights.bin", Fault(wrong_bytes_at=tuple(range(0, SIZE, 50_000))))
        result = puller(mirror.url("model.meta4"), peers=(peer,), peer_timeout=20.0)
        host = mirror.base_url.partition("//")[2]
    puller.assert_exact(result, MODEL)
    assert {lie.source for lie in puller.of_kind(SourceLied)} == {host}


def test_a_lying_peer_is_named_and_the_mirror_goes_on(puller: Puller, published: Publication, tmp_path: Path) -> None:
    wrong = PublisherSimulator({**MODEL.files, "a/weights.bin": random.Random(42).randbytes(SIZE)})
    wrong.publish(tmp_path / "liar")
    settings = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, uploads=True)
    metainfo = parse_metainfo(published.torrent_path.read_bytes())
    liar = Seeder(metainfo, tmp_path / "liar" / "model", settings, skips_checks=True)
    try:
        with serving(published, rate_bytes_per_second=1_000_000) as mirror:
            when(lambda: bool(puller.of_kind(SourceLied)), lambda: setattr(mirror, "rate_bytes_per_second", None))
            result = puller(mirror.url("model.meta4"), peers=(f"127.0.0.1:{liar.port}",), connections=1)
    finally:
        liar.close()
    puller.assert_exact(result, MODEL)
    assert [lie.source for lie in puller.of_kind(SourceLied)] == [f"peer 127.0.0.1:{liar.port}"]


def test_a_torrent_of_another_release_is_told_and_left_out(
    puller: Puller, published: Publication, tmp_path: Path
) -> None:
    other = PublisherSimulator({**MODEL.files, "a/weights.bin": random.Random(43).randbytes(SIZE)})
    misplaced = other.publish(tmp_path)
    with (
        seeding(misplaced.torrent_path) as peer,
        serving(published, TORRENTS[:1], rate_bytes_per_second=1_500_000) as mirror,
    ):
        assert isinstance(mirror.files, dict)
        mirror.files["model.torrent"] = misplaced.torrent_path.read_bytes()
        when(
            lambda: any("another a/weights.bin" in failed.reason for failed in puller.of_kind(SourceFailed)),
            lambda: setattr(mirror, "rate_bytes_per_second", None),
        )
        result = puller(mirror.url("model.meta4"), peers=(peer,), connections=1)
    puller.assert_exact(result, MODEL)
    assert any("another a/weights.bin" in failed.reason for failed in puller.of_kind(SourceFailed))


def test_when_nobody_can_deliver_each_reason_is_told(puller: Puller, published: Publication) -> None:
    with serving(published) as mirror:
        for path in MODEL.files:
            mirror.always(f"model/{path}", Fault(status=404))
        began = time.monotonic()
        with pytest.raises(AllSourcesFailed) as caught:
            puller(mirror.url("model.meta4"), peers=(f"127.0.0.1:{unused_port()}",), peer_timeout=1.0)
    assert time.monotonic() - began < 15
    assert caught.value.exit_code == 6
    assert "404" in caught.value.detail
    assert "expected a peer, got none" in caught.value.detail
    puller.assert_nothing_published()


def test_a_missing_torrent_is_no_trouble(puller: Puller, published: Publication) -> None:
    with serving(published, rate_bytes_per_second=2_000_000) as mirror:
        assert isinstance(mirror.files, dict)
        for name in TORRENTS:
            del mirror.files[name]
        result = puller(mirror.url("model.meta4"), peers=("127.0.0.1:9",))
    puller.assert_exact(result, MODEL)


def test_where_there_is_nowhere_to_ask_no_peer_is_missed(puller: Puller, published: Publication) -> None:
    with serving(published, rate_bytes_per_second=1_000_000) as mirror:
        result = puller(mirror.url("model.meta4"))
    puller.assert_exact(result, MODEL)
    assert puller.of_kind(SourceFailed) == []
    assert not any("torrent" in event.source for event in puller.of_kind(SourceConnected))


def test_one_limit_holds_for_both_together(puller: Puller, published: Publication) -> None:
    limit = 2_000_000
    with seeding(published.torrent_path) as peer, serving(published) as mirror:
        began = time.monotonic()
        result = puller(mirror.url("model.meta4"), peers=(peer,), limit=limit)
        elapsed = time.monotonic() - began
    puller.assert_exact(result, MODEL)
    # The bucket lets a quarter of a second's worth through at once, and what libtorrent has in hand is paid for later.
    assert elapsed > 0.7 * SIZE / limit


def test_what_an_interrupted_mixed_pull_verified_is_not_fetched_again(puller: Puller, published: Publication) -> None:
    with (
        seeding(published.torrent_path, rate=1_000_000) as peer,
        serving(published, rate_bytes_per_second=300_000) as mirror,
    ):

        def received() -> int:
            return sum(event.length for event in puller.of_kind(BytesReceived))

        when(lambda: received() > SIZE // 3, puller.stop.set)
        with pytest.raises(Exception, match="stopped"):
            puller(mirror.url("model.meta4"), peers=(peer,), connections=2)
        first = received()
        again = Puller(puller.home)
        result = again(mirror.url("model.meta4"), peers=(peer,), connections=2)
    again.assert_exact(result, MODEL)
    second = sum(event.length for event in again.of_kind(BytesReceived))
    assert first + second <= SIZE + 40 * 64 * KIB, "whole pieces count; what was begun is fetched again"
    assert [notice.text for notice in again.of_kind(Notice) if "changed" in notice.text] == []
