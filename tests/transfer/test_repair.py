"""A damaged model becomes whole again, and no more than the damage is fetched."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.config import Settings
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import MistralFetchError, NotInCache
from mistral_fetch.events import Notice, SourceLied
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.simulators.publisher import SMALL_PIECE_LENGTH, PublisherSimulator
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.partials import Partial
from mistral_fetch.store.snapshots import find_refs
from mistral_fetch.store.verify import verify_snapshot
from mistral_fetch.transfer.repair import Damage, Repaired, find_damage, repair
from tests.transfer.conftest import Puller, Seed

PIECE = SMALL_PIECE_LENGTH
WEIGHTS = random.Random(61).randbytes(9 * PIECE + 321)
MODEL = PublisherSimulator({"weights.bin": WEIGHTS, "config.json": b'{"a": 1}'})


@pytest.fixture
def mirror() -> Iterator[MirrorSimulator]:
    with MODEL.serve() as serving:
        yield serving


class Mender:
    """Repairs as the command line does."""

    def __init__(self, puller: Puller) -> None:
        self.puller = puller

    def settings(self, **given: Any) -> Settings:
        patience: dict[str, Any] = {"connect_timeout": 2.0, "read_timeout": 1.0, "peer_timeout": 2.0, "dht": False}
        return Settings(home=self.puller.home, **(patience | {"disk_reserve": 0} | given))

    def __call__(self, ref: str, adopt_from: Sequence[Path] = (), **given: Any) -> tuple[Damage, Repaired]:
        settings, puller = self.settings(**given), self.puller
        damage = find_damage(ref, settings, puller.events.append, puller.stop)
        return damage, repair(ref, damage, settings, puller.events.append, puller.stop, adopt_from)

    def assert_whole(self, directory: Path) -> None:
        """Check that every file is right and that nothing unfinished is left."""
        _, verdicts = verify_snapshot(directory, lambda _: None, lambda: None)
        assert [verdict for verdict in verdicts if not verdict.is_good] == []
        self.puller.assert_blobs_are_right()
        assert list(self.puller.home.glob("partial/*")) == []


@pytest.fixture
def mend(puller: Puller) -> Mender:
    return Mender(puller)


def flip(directory: Path, *offsets: int) -> None:
    path = (directory / "weights.bin").resolve()
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    path.write_bytes(content)


def papers(directory: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((directory / "PROVENANCE.json").read_bytes())
    return record


def test_two_flipped_bytes_cost_two_pieces(puller: Puller, mend: Mender, mirror: MirrorSimulator) -> None:
    url = mirror.url("model.meta4")
    directory = puller(url).directory
    before = mirror.bytes_sent("model/weights.bin")
    flip(directory, PIECE + 7, 9 * PIECE)  # the last piece is 321 bytes long
    damage, done = mend(url)
    assert [span.start for span in damage.verdicts[0].bad_spans] == [PIECE, 9 * PIECE]
    assert mirror.bytes_sent("model/weights.bin") - before == PIECE + 321
    assert (done.directory, done.received) == (directory, {"weights.bin": PIECE + 321})
    mend.assert_whole(directory)


def test_a_whole_model_has_no_damage(puller: Puller, mend: Mender, mirror: MirrorSimulator) -> None:
    puller(mirror.url("model.meta4"))
    assert find_damage(mirror.url("model.meta4"), mend.settings(), lambda _: None, puller.stop).verdicts == ()


def test_an_address_that_has_another_model_by_now_does_not_change_the_content(
    puller: Puller, mend: Mender, tmp_path: Path
) -> None:
    with MirrorSimulator(MODEL.files) as files, MirrorSimulator({}) as address:
        address.files = {"m.meta4": serialise_metalink(MODEL.manifest([files.base_url]))}
        directory = puller(address.url("m.meta4")).directory
        flip(directory, 5)
        other = PublisherSimulator({**MODEL.files, "config.json": b'{"a": 2}'})
        address.files = {"m.meta4": serialise_metalink(other.manifest([files.base_url]))}
        asked = len(address.requests())
        _, done = mend(address.url("m.meta4"))
        assert len(address.requests()) == asked
    assert done.directory == directory
    mend.assert_whole(directory)


def test_what_vouched_for_the_files_is_not_upgraded_and_the_sender_is_added(puller: Puller, mend: Mender) -> None:
    with MODEL.serve(MODEL.manifest(piece_length=None, has_sha256=False)) as mirror:
        result = puller(mirror.url("model.meta4"), min_assurance=Assurance.SIZE)
        old = papers(result.directory)
        flip(result.directory, 5)
        mend(mirror.url("model.meta4"))
        host = "{}:{}".format(*mirror.address)
    new = papers(result.directory)
    assert [file["assurance"] for file in new["files"]] == ["size", "size"]
    assert [file["promised"] for file in new["files"]] == [[], []]
    assert new["files"][1]["sources"] == [host]
    assert {**new, "files": None} == {**old, "files": None}
    mend.assert_whole(result.directory)


@pytest.mark.parametrize(
    "content, cost", [(WEIGHTS[: 3 * PIECE + 5], len(WEIGHTS) - 3 * PIECE), (WEIGHTS + b"more", 0)]
)
def test_a_blob_of_another_size_costs_what_is_missing(
    puller: Puller, mend: Mender, mirror: MirrorSimulator, content: bytes, cost: int
) -> None:
    directory = puller(mirror.url("model.meta4")).directory
    blob = (directory / "weights.bin").resolve()
    blob.chmod(0o644)
    blob.write_bytes(content)
    _, done = mend(mirror.url("model.meta4"))
    assert sum(done.received.values()) == cost
    mend.assert_whole(directory)


def test_a_deleted_blob_is_fetched_and_nothing_else(puller: Puller, mend: Mender, mirror: MirrorSimulator) -> None:
    directory = puller(mirror.url("model.meta4")).directory
    (directory / "config.json").resolve().unlink()
    damage, done = mend(mirror.url("model.meta4"))
    assert [verdict.path for verdict in damage.verdicts] == ["config.json"]
    assert done.received == {"config.json": len(MODEL.files["config.json"])}
    mend.assert_whole(directory)


@pytest.mark.parametrize("kind", ["copy", "hard link", "wrong link", "folder", "nothing"])
def test_what_stands_in_a_link_s_place_is_replaced(
    puller: Puller, mend: Mender, mirror: MirrorSimulator, tmp_path: Path, kind: str
) -> None:
    directory = puller(mirror.url("model.meta4")).directory
    link, blob = directory / "weights.bin", (directory / "weights.bin").resolve()
    link.unlink()
    (tmp_path / "wrong").write_bytes(WEIGHTS[:-1] + b"\0")
    {
        "copy": lambda: shutil.copy(tmp_path / "wrong", link),
        "hard link": lambda: os.link(blob, link),
        "wrong link": lambda: link.symlink_to(tmp_path / "wrong"),
        "folder": lambda: (link / "x").mkdir(parents=True),
        "nothing": lambda: None,
    }[kind]()
    if kind == "hard link":
        flip(directory, 5)
    before = mirror.bytes_sent("model/weights.bin")
    _, done = mend(mirror.url("model.meta4"))
    assert done.directory == directory
    mend.assert_whole(directory)
    assert (directory / "weights.bin").is_symlink()
    assert mirror.bytes_sent("model/weights.bin") - before == (PIECE if kind == "hard link" else 0)
    assert (tmp_path / "wrong").read_bytes() == WEIGHTS[:-1] + b"\0"


def test_a_folder_that_has_the_file_s_size_by_chance_is_replaced(puller: Puller, mend: Mender, tmp_path: Path) -> None:
    model = PublisherSimulator({"weights.bin": b"x" * tmp_path.stat().st_size})
    with model.serve() as mirror:
        directory = puller(mirror.url("model.meta4")).directory
        (directory / "weights.bin").unlink()
        (directory / "weights.bin").mkdir()
        mend(mirror.url("model.meta4"))
    mend.assert_whole(directory)


@pytest.mark.parametrize("name", ["manifest.meta4", ".complete", "PROVENANCE.json"])
def test_papers_that_are_damaged_are_written_anew_and_nothing_is_fetched(
    puller: Puller, mend: Mender, mirror: MirrorSimulator, name: str
) -> None:
    directory = puller(mirror.url("model.meta4")).directory
    old = papers(directory)
    (directory / name).write_bytes(b"{")
    before = mirror.bytes_sent("model/")
    damage, done = mend(mirror.url("model.meta4"))
    assert len(damage.verdicts) == 1
    assert (done.directory, mirror.bytes_sent("model/")) == (directory, before)
    assert [f["assurance"] for f in papers(directory)["files"]] == [f["assurance"] for f in old["files"]]
    mend.assert_whole(directory)


def test_a_snapshot_that_is_gone_is_laid_out_again(puller: Puller, mend: Mender, mirror: MirrorSimulator) -> None:
    directory = puller(mirror.url("model.meta4")).directory
    shutil.rmtree(directory)
    _, done = mend(mirror.url("model.meta4"))
    assert (done.directory, done.received) == (directory, {})
    mend.assert_whole(directory)


def test_a_manifest_beside_its_files_is_asked_again(puller: Puller, mend: Mender, tmp_path: Path) -> None:
    # Its own copy in the snapshot names no mirror: addresses on this disk are not kept.
    ref = str(MODEL.publish(tmp_path).manifest_path)
    directory = puller(ref).directory
    flip(directory, 5)
    _, done = mend(ref)
    assert sum(done.received.values()) == len(WEIGHTS)  # one piece of 4 MiB
    mend.assert_whole(directory)


def test_mirrors_that_are_gone_give_way_to_what_the_ref_leads_to(puller: Puller, mend: Mender, tmp_path: Path) -> None:
    with MirrorSimulator({}) as address:
        with MirrorSimulator(MODEL.files) as gone:
            address.files = {"m.meta4": serialise_metalink(MODEL.manifest([gone.base_url]))}
            directory = puller(address.url("m.meta4")).directory
        flip(directory, 5)
        with MirrorSimulator(MODEL.files) as moved:
            address.files = {"m.meta4": serialise_metalink(MODEL.manifest([moved.base_url]))}
            _, done = mend(address.url("m.meta4"))
            assert moved.bytes_sent("weights.bin") == PIECE
    assert done.received == {"weights.bin": PIECE}
    mend.assert_whole(directory)


def test_a_ref_that_leads_to_other_files_when_its_mirrors_are_gone_gets_those_and_says_so(
    puller: Puller, mend: Mender
) -> None:
    other = PublisherSimulator({**MODEL.files, "config.json": b'{"a": 2}'})
    with MirrorSimulator({}) as address:
        with MirrorSimulator(MODEL.files) as gone:
            address.files = {"m.meta4": serialise_metalink(MODEL.manifest([gone.base_url]))}
            directory = puller(address.url("m.meta4")).directory
        flip(directory, 5)
        with MirrorSimulator(other.files) as moved:
            address.files = {"m.meta4": serialise_metalink(other.manifest([moved.base_url]))}
            _, done = mend(address.url("m.meta4"))
    assert done.directory != directory
    assert done.received == {"weights.bin": PIECE, "config.json": 8}
    assert any("has other files today" in notice.text for notice in puller.of_kind(Notice))
    mend.assert_whole(done.directory)


def test_a_mirror_that_lies_is_exit_code_32_and_what_is_good_is_kept(
    puller: Puller, mend: Mender, mirror: MirrorSimulator
) -> None:
    url = mirror.url("model.meta4")
    directory = puller(url).directory
    flip(directory, 5)
    mirror.always("model/weights.bin", Fault(wrong_bytes_at=(5,)))
    with pytest.raises(MistralFetchError) as caught:
        mend(url)
    assert caught.value.exit_code == 32
    assert puller.of_kind(SourceLied)
    puller.assert_blobs_are_right()
    mirror.always("model/weights.bin", Fault())
    _, done = mend(url)
    assert done.received == {"weights.bin": PIECE}
    mend.assert_whole(directory)


def test_nobody_to_ask_is_exit_code_6(puller: Puller, mend: Mender) -> None:
    with MODEL.serve() as mirror:
        url = mirror.url("model.meta4")
        flip(puller(url).directory, 5)
    with pytest.raises(MistralFetchError) as caught:
        mend(url, connect_timeout=0.5)
    assert caught.value.exit_code == 6


def test_a_model_that_was_never_pulled_is_exit_code_3(mend: Mender) -> None:
    with pytest.raises(NotInCache) as caught:
        mend("hf:org/model")
    assert caught.value.exit_code == 3
    assert not mend.puller.home.exists()


def test_a_good_copy_on_this_machine_needs_no_network(
    puller: Puller, mend: Mender, mirror: MirrorSimulator, tmp_path: Path
) -> None:
    url = mirror.url("model.meta4")
    directory = puller(url).directory
    flip(directory, 5)
    (tmp_path / "copy").write_bytes(WEIGHTS)
    (tmp_path / "usb").mkdir()
    shutil.move(tmp_path / "copy", tmp_path / "usb/weights.bin")
    asked = len(mirror.requests())
    _, done = mend(url, adopt_from=[tmp_path / "usb"], offline=True)
    assert (done.received, len(mirror.requests())) == ({}, asked)
    mend.assert_whole(directory)


def test_the_note_of_a_crashed_pull_does_not_hide_the_damage(
    puller: Puller, mend: Mender, mirror: MirrorSimulator
) -> None:
    url = mirror.url("model.meta4")
    directory = puller(url).directory
    entry = MODEL.manifest().entry("weights.bin")
    partial = Partial(Layout(puller.home).partial(f"sha256-{entry.sha256}"), len(WEIGHTS), entry.pieces)
    assert entry.pieces is not None
    partial.set_committed(CommittedBlob(entry.sha256 or "", len(WEIGHTS), entry.pieces))
    flip(directory, 5)
    _, done = mend(url)
    assert done.received == {"weights.bin": PIECE}
    mend.assert_whole(directory)


def test_a_name_as_list_prints_it_is_repaired_from_the_snapshot_s_own_mirrors(
    puller: Puller, mend: Mender, tmp_path: Path
) -> None:
    with MirrorSimulator(MODEL.files) as mirror:
        (tmp_path / "m.meta4").write_bytes(serialise_metalink(MODEL.manifest([mirror.base_url])))
        result = puller(str(tmp_path / "m.meta4"))
        (tmp_path / "m.meta4").unlink()
        flip(result.directory, 5)
        _, done = mend(result.key)
    assert done.received == {"weights.bin": PIECE}
    assert [record.key for record in find_refs(Layout(puller.home), result.key)] == [result.key]
    mend.assert_whole(result.directory)


def test_pulling_again_salvages_as_well(puller: Puller, mirror: MirrorSimulator) -> None:
    url = mirror.url("model.meta4")
    directory = puller(url).directory
    flip(directory, 5, 3 * PIECE)
    again = puller(url, refresh=True)
    assert again.received_bytes == 2 * PIECE
    puller.assert_exact(again, MODEL)


def test_a_hard_linked_file_of_the_user_is_not_written_to(
    puller: Puller, mend: Mender, mirror: MirrorSimulator, tmp_path: Path
) -> None:
    theirs = tmp_path / "usb/weights.bin"
    theirs.parent.mkdir()
    theirs.write_bytes(WEIGHTS)
    url = mirror.url("model.meta4")
    directory = puller(url, adopt_from=[theirs.parent]).directory
    if not (directory / "weights.bin").samefile(theirs):
        pytest.skip("this file system shares blocks, so nobody's edit reaches the blob")
    edited = bytearray(WEIGHTS)
    edited[5] ^= 1
    theirs.write_bytes(edited)
    _, done = mend(url)
    assert done.received == {"weights.bin": PIECE}
    assert theirs.read_bytes() == edited
    mend.assert_whole(directory)


@pytest.mark.swarm
@pytest.mark.parametrize("plain", [True, False])
def test_a_torrent_gives_the_bad_pieces_only(
    puller: Puller, mend: Mender, tmp_path: Path, seed: Seed, plain: bool
) -> None:
    # Our own pieces are of 4 MiB; inside the bad one, the torrent's smaller ones tell more.
    content = random.Random(62).randbytes(9 * 1024 * 1024)
    publication = PublisherSimulator({"weights.bin": content}).publish(tmp_path)
    torrent = publication.plain_torrent_path if plain else publication.torrent_path
    peer = seed(torrent, tmp_path / "model")
    result = puller(str(torrent), peers=(peer,))
    old = papers(result.directory)
    flip(result.directory, 5)
    _, done = mend(str(torrent), peers=(peer,))
    assert done.directory == result.directory
    assert done.received == {"weights.bin": parse_metainfo(torrent.read_bytes()).piece_length}
    assert papers(result.directory)["files"][0]["assurance"] == old["files"][0]["assurance"]
    mend.assert_whole(result.directory)


def test_a_manifest_without_pieces_borrows_those_that_this_cache_computed(puller: Puller, mend: Mender) -> None:
    big = PublisherSimulator({"weights.bin": random.Random(63).randbytes(9 * 1024 * 1024)})
    with big.serve(big.manifest(piece_length=None)) as mirror:
        url = mirror.url("model.meta4")
        directory = puller(url).directory
        flip(directory, 5)
        (directory / "PROVENANCE.json").unlink()  # so its own manifest may not say what vouches for it
        _, done = mend(url)
    assert done.received == {"weights.bin": 4 * 1024 * 1024}
    mend.assert_whole(directory)


def test_replacing_keeps_what_the_manifest_says(puller: Puller, mend: Mender, mirror: MirrorSimulator) -> None:
    directory = puller(mirror.url("model.meta4")).directory
    before = (directory / "manifest.meta4").read_bytes()
    (directory / "weights.bin").unlink()
    mend(mirror.url("model.meta4"))
    assert (directory / "manifest.meta4").read_bytes() == before
