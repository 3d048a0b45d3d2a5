"""Whole pulls of torrents, magnet links and manifests that point to torrents, from a seeder on loopback."""

from __future__ import annotations

import json
import random
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import MistralFetchError, NoPeers, TorrentMismatch
from mistral_fetch.manifest import TorrentLink
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from tests.transfer.conftest import Puller, Seed

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(60)]

MODEL = PublisherSimulator(
    {"consolidated.00.pth": random.Random(12).randbytes(700_000), "params.json": b"{}", "deep/er/x": b"x" * 40_000}
)


def test_a_torrent_is_pulled_from_its_seeder(puller: Puller, tmp_path: Path, seed: Seed) -> None:
    publication = MODEL.publish(tmp_path)
    peer = seed(publication.torrent_path, tmp_path / "model")
    result = puller(str(publication.torrent_path), peers=(peer,))
    puller.assert_exact(result, MODEL)
    assert (result.channel, result.assurance) == ("torrent", "btv2")
    record = json.loads((result.directory / "PROVENANCE.json").read_text())
    assert {file["sha256"] for file in record["files"]} == {entry.sha256 for entry in MODEL.manifest().files}


def test_a_plain_torrent_is_as_good_but_says_so(puller: Puller, tmp_path: Path, seed: Seed) -> None:
    publication = MODEL.publish(tmp_path)
    peer = seed(publication.plain_torrent_path, tmp_path / "model")
    result = puller(str(publication.plain_torrent_path), peers=(peer,))
    puller.assert_exact(result, MODEL)
    assert result.assurance == "btv1"


def test_sha1_pieces_are_refused_when_more_is_asked(puller: Puller, tmp_path: Path) -> None:
    publication = MODEL.publish(tmp_path)
    with pytest.raises(MistralFetchError) as caught:
        puller(str(publication.plain_torrent_path), peers=("127.0.0.1:9",), min_assurance=Assurance.SHA256)
    assert caught.value.exit_code == 33
    puller.assert_nothing_published()


def test_a_magnet_link_is_enough(puller: Puller, tmp_path: Path, seed: Seed) -> None:
    publication = MODEL.publish(tmp_path)
    peer = seed(publication.torrent_path, tmp_path / "model")
    result = puller(f"magnet:?xt=urn:btih:{publication.info_hash_v1}", peers=(peer,), peer_timeout=10.0)
    puller.assert_exact(result, MODEL)


def test_the_channels_bring_the_same_snapshot(puller: Puller, tmp_path: Path, seed: Seed) -> None:
    publication = MODEL.publish(tmp_path)
    peer = seed(publication.torrent_path, tmp_path / "model")
    by_torrent = puller(str(publication.torrent_path), peers=(peer,))
    by_files = puller(str(publication.manifest_path))
    assert by_torrent.directory == by_files.directory
    assert by_files.received_bytes == 0


def test_a_dead_swarm_is_exit_code_6_in_bounded_time(puller: Puller, tmp_path: Path) -> None:
    publication = MODEL.publish(tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(NoPeers) as caught:
        puller(str(publication.torrent_path), peers=(f"127.0.0.1:{port}",), peer_timeout=1.0)
    assert time.monotonic() - began < 10
    assert caught.value.exit_code == 6
    assert "--peer" in caught.value.hint
    puller.assert_nothing_published()


def test_a_magnet_nobody_knows_is_exit_code_6_in_bounded_time(puller: Puller) -> None:
    began = time.monotonic()
    with pytest.raises(MistralFetchError) as caught:
        puller("magnet:?xt=urn:btih:" + "1" * 40, peers=("127.0.0.1:9",), peer_timeout=1.0)
    assert time.monotonic() - began < 10
    assert caught.value.exit_code == 6


def test_after_a_dead_swarm_the_mirror_beside_it_delivers(puller: Puller, tmp_path: Path) -> None:
    publication = MODEL.publish(tmp_path)
    with pytest.raises(MistralFetchError) as caught:
        puller(str(publication.manifest_path), via="torrent", peers=("127.0.0.1:9",))
    assert caught.value.exit_code == 6
    puller.assert_exact(puller(str(publication.manifest_path)), MODEL)


def test_a_manifest_s_torrent_delivers_when_its_mirror_is_gone(puller: Puller, tmp_path: Path, seed: Seed) -> None:
    publication = MODEL.publish(tmp_path, mirrors=["http://127.0.0.1:1/model"])
    manifest = publication.manifest
    entries = [replace(e, torrents=(TorrentLink("model.torrent", e.path),)) for e in manifest.files]
    publication.manifest_path.write_bytes(serialise_metalink(manifest.with_files(entries)))
    peer = seed(publication.torrent_path, tmp_path / "model")
    result = puller(str(publication.manifest_path), peers=(peer,), connect_timeout=0.5)
    puller.assert_exact(result, MODEL)
    assert result.assurance == "sha256"


@pytest.mark.parametrize("difference", ["another size", "a file less"])
def test_a_torrent_whose_files_differ_from_the_manifest_is_exit_code_32(
    puller: Puller, tmp_path: Path, difference: str
) -> None:
    files = dict(MODEL.files)
    if difference == "another size":
        files["params.json"] += b" "
    else:
        del files["params.json"]
    other = PublisherSimulator(files).publish(tmp_path / "other")
    manifest = MODEL.manifest(["http://127.0.0.1:1"])
    link = (other.torrent_path.as_uri(),)
    entries = [replace(e, mirrors=(), torrents=(TorrentLink(link[0], e.path),)) for e in manifest.files]
    path = tmp_path / "other" / "lie.meta4"
    path.write_bytes(serialise_metalink(manifest.with_files(entries)))
    with pytest.raises(TorrentMismatch) as caught:
        puller(str(path), peers=("127.0.0.1:9",))
    assert caught.value.exit_code == 32
    assert "params.json" in caught.value.what
    puller.assert_nothing_published()


def test_a_torrent_of_the_same_sizes_but_other_bytes_is_exit_code_32(
    puller: Puller, tmp_path: Path, seed: Seed
) -> None:
    files = {**MODEL.files, "params.json": b"[]"}
    other = PublisherSimulator(files).publish(tmp_path)
    peer = seed(other.torrent_path, tmp_path / "model")
    manifest = MODEL.manifest()
    entries = [replace(e, mirrors=(), torrents=(TorrentLink("model.torrent", e.path),)) for e in manifest.files]
    other.manifest_path.write_bytes(serialise_metalink(manifest.with_files(entries)))
    with pytest.raises(MistralFetchError) as caught:
        puller(str(other.manifest_path), peers=(peer,))
    assert caught.value.exit_code == 32
    assert "params.json" in caught.value.what
    puller.assert_nothing_published()


def test_a_torrent_s_own_digests_do_not_stand_in_for_the_manifest_s(puller: Puller, tmp_path: Path, seed: Seed) -> None:
    # The torrent is honest; the manifest asks for something else and is believed.
    publication = MODEL.publish(tmp_path)
    peer = seed(publication.torrent_path, tmp_path / "model")
    entries = [
        replace(
            e, digests=(Digest("sha256", f"{n:064}"),), pieces=None, torrents=(TorrentLink("model.torrent", e.path),)
        )
        for n, e in enumerate(MODEL.manifest().files)
    ]
    publication.manifest_path.write_bytes(serialise_metalink(MODEL.manifest().with_files(entries)))
    with pytest.raises(MistralFetchError) as caught:
        puller(str(publication.manifest_path), via="torrent", peers=(peer,))
    assert caught.value.exit_code == 32
    puller.assert_nothing_published()


def test_what_http_began_is_completed_by_the_swarm(puller: Puller, tmp_path: Path, seed: Seed) -> None:
    publication = MODEL.publish(tmp_path)
    peer = seed(publication.torrent_path, tmp_path / "model")
    with MirrorSimulator(MODEL.files) as mirror:
        mirror.script("consolidated.00.pth", [Fault(end_at=500_000), *[Fault(status=404)] * 9])
        manifest = MODEL.manifest([mirror.base_url])
        link = publication.torrent_path.as_uri()
        entries = [replace(e, torrents=(TorrentLink(link, e.path),)) for e in manifest.files]
        publication.manifest_path.write_bytes(serialise_metalink(manifest.with_files(entries)))
        result = puller(str(publication.manifest_path), peers=(peer,))
    puller.assert_exact(result, MODEL)
    assert result.received_bytes <= publication.size + 64 * 1024
