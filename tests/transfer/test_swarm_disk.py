"""Data files that change under a running torrent: the end is the right model or the right error, never other bytes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.bittorrent.client import Download
from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.errors import Interrupted, StoreError
from mistral_fetch.events import BytesReceived, Event, Notice
from mistral_fetch.manifest import TorrentLink
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.partials import Partial
from tests.transfer.conftest import Puller

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(60)]

MODEL = PublisherSimulator({"weights.bin": random.Random(3).randbytes(3_000_000), "params.json": b"{}"})
SEEDING = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, uploads=True)


@pytest.fixture(params=["torrent", "manifest"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A slow seed, and the reference to pull: with digests of whole files, or none but the torrent's."""
    publication = MODEL.publish(tmp_path)
    torrent = publication.plain_torrent_path
    entries = [
        replace(entry, mirrors=(), torrents=(TorrentLink(torrent.as_uri(), entry.path),))
        for entry in MODEL.manifest().files
    ]
    publication.manifest_path.write_bytes(serialise_metalink(MODEL.manifest().with_files(entries)))
    metainfo = parse_metainfo(torrent.read_bytes())
    with closing(Seeder(metainfo, tmp_path / "model", SEEDING, rate_bytes_per_second=3_000_000)) as seeder:
        seeder.wait_until_seeding(30)
        ref = torrent if request.param == "torrent" else publication.manifest_path
        yield str(ref), f"127.0.0.1:{seeder.port}"


def truncate(path: Path) -> None:
    os.truncate(path, 0)


def replace_file(path: Path) -> None:
    other = path.with_name("other")
    shutil.copyfile(path, other)
    other.replace(path)


def replace_by_zeros(path: Path) -> None:
    path.with_name("other").write_bytes(bytes(path.stat().st_size))
    path.with_name("other").replace(path)


class Meddler:
    """Changes the largest data file once, as soon as so many bytes have come."""

    def __init__(self, puller: Puller, meddle: Callable[[Path], None], after: int = 1_500_000) -> None:
        self._puller = puller
        self._meddle = meddle
        self._left = after
        self.did = 0

    def __call__(self, event: Event) -> None:
        self._puller.events.append(event)
        self._left -= event.length if isinstance(event, BytesReceived) else 0
        if self._left <= 0 and not self.did:
            self.did += 1
            self._meddle(max(self._puller.home.glob("partial/*/data"), key=lambda path: path.stat().st_size))


EVERYTHING_LATER = 1 << 30


@pytest.mark.parametrize(
    "world, meddle, lag_bytes",
    [
        ("torrent", truncate, 0),
        ("torrent", truncate, EVERYTHING_LATER),
        ("torrent", replace_file, 0),
        ("torrent", replace_by_zeros, 0),
        ("torrent", Path.unlink, 0),
        ("manifest", truncate, 0),
        ("manifest", replace_by_zeros, 0),
    ],
    indirect=["world"],
)
def test_a_data_file_that_another_program_changes(
    puller: Puller,
    world: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    meddle: Callable[[Path], None],
    lag_bytes: int,
) -> None:
    monkeypatch.setattr("mistral_fetch.bittorrent.readback.LAG_BYTES", lag_bytes)
    ref, peer = world
    meddler = Meddler(puller, meddle)
    puller.report = meddler  # type: ignore[method-assign]
    try:
        result = puller(ref, peers=(peer,), via="torrent", peer_timeout=20.0)
    except StoreError:
        puller.assert_nothing_published()
        result = puller(ref, peers=(peer,), via="torrent", peer_timeout=20.0)
    assert meddler.did
    puller.assert_exact(result, MODEL)
    assert any("another program" in event.text for event in puller.of_kind(Notice))


def test_an_undisturbed_file_is_not_read_twice(
    puller: Puller, world: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, peer = world
    monkeypatch.setattr(Download, "recheck", lambda _: pytest.fail("all was read back already"))
    monkeypatch.setattr("mistral_fetch.store.blobs._hash_reporting", lambda *_: pytest.fail("all was hashed already"))
    puller.assert_exact(puller(ref, peers=(peer,), via="torrent"), MODEL)


@pytest.mark.parametrize("world", ["manifest"], indirect=True)
def test_what_the_swarm_brought_before_a_stop_is_recorded_for_any_source(
    puller: Puller, world: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistral_fetch.bittorrent.readback.LAG_BYTES", 0)
    ref, peer = world
    meddler = Meddler(puller, lambda _: puller.stop.set(), after=2_000_000)
    puller.report = meddler  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        puller(ref, peers=(peer,), via="torrent")
    (begun,) = [path.parent for path in puller.home.glob("partial/*/data") if path.stat().st_size > 1000]
    entry = next(entry for entry in MODEL.manifest().files if entry.path == "weights.bin")
    assert Partial(begun, entry.size or 0, entry.pieces).present_bytes > 1_000_000
