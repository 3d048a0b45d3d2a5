"""What lies on the machine already is not downloaded: directories the user names, and Hugging Face's cache."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_fetch.config import Settings
from mistral_fetch.digest import Assurance, Digest, new_hash
from mistral_fetch.errors import OfflineRefused
from mistral_fetch.events import BytesReceived, Event, FileVerified, Notice, TransferPlanned
from mistral_fetch.manifest import FileEntry
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.transfer import shelves
from mistral_fetch.transfer.adoption import Adopter
from mistral_fetch.transfer.shelves import DirectoryShelf, HubCacheShelf, hub_cache_directory, open_shelves
from tests.transfer.conftest import Puller

WEIGHTS = random.Random(41).randbytes(300_000)
MODEL = PublisherSimulator({"weights/w.bin": WEIGHTS, "config.json": b'{"a": 1}'})
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
ENTRY = MODEL.manifest().entry("weights/w.bin")


@pytest.fixture
def mirror() -> Iterator[MirrorSimulator]:
    with MODEL.serve() as serving:
        yield serving


@pytest.fixture
def usb(tmp_path: Path) -> Path:
    """A disk that somebody brought, empty yet."""
    (tmp_path / "usb").mkdir()
    return tmp_path / "usb"


def put(path: Path, content: bytes = WEIGHTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


PLACES = [
    "weights/w.bin",
    "model/weights/w.bin",
    "w.bin",
    "a/b/c/w.bin",
    SHA256,
    f"a/b/{SHA256}",
    f"blobs/sha256/{SHA256[:2]}/{SHA256}",
    f"models--org--name/blobs/{SHA256}",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_file_is_found_where_people_and_programs_put_it(
    puller: Puller, mirror: MirrorSimulator, usb: Path, place: str
) -> None:
    put(usb / place)
    result = puller(mirror.url("model.meta4"), adopt_from=[usb])
    puller.assert_exact(result, MODEL)
    assert mirror.bytes_sent("model/weights/w.bin") == 0
    assert result.received_bytes == len(MODEL.files["config.json"])
    assert {event.path for event in puller.of_kind(BytesReceived)} == {"config.json"}
    assert (usb / place).read_bytes() == WEIGHTS


def test_provenance_says_where_it_was_found_and_what_vouched_for_it(
    puller: Puller, mirror: MirrorSimulator, usb: Path
) -> None:
    put(usb / "w.bin")
    result = puller(mirror.url("model.meta4"), adopt_from=[usb])
    files = {file["path"]: file for file in json.loads((result.directory / "PROVENANCE.json").read_text())["files"]}
    assert files["weights/w.bin"]["sources"] == [f"adopted from {usb}"]
    assert files["weights/w.bin"]["assurance"] == "sha256"
    assert files["config.json"]["sources"] == ["{}:{}".format(*mirror.address)]
    assert [event.path for event in puller.of_kind(FileVerified)] == ["weights/w.bin", "config.json"]


def test_a_directory_whose_name_is_no_text_can_be_written_down(
    puller: Puller, mirror: MirrorSimulator, tmp_path: Path
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n"))
    put(odd / "w.bin")
    result = puller(mirror.url("model.meta4"), adopt_from=[odd])
    assert "\\udcff\\n" in json.loads((result.directory / "PROVENANCE.json").read_text())["files"][1]["sources"][0]


def test_a_wrong_file_is_named_and_the_right_one_downloaded(puller: Puller, mirror: MirrorSimulator, usb: Path) -> None:
    wrong = put(usb / "w.bin", WEIGHTS[:-1] + b"\0")
    result = puller(mirror.url("model.meta4"), adopt_from=[usb])
    puller.assert_exact(result, MODEL)
    assert any(str(wrong) in event.text and "not adopted" in event.text for event in puller.of_kind(Notice))
    assert wrong.read_bytes() == WEIGHTS[:-1] + b"\0"


def test_the_next_candidate_is_tried_after_a_wrong_one(puller: Puller, mirror: MirrorSimulator, usb: Path) -> None:
    put(usb / "w.bin", WEIGHTS[:-1] + b"\0")
    put(usb / "deep/er/w.bin")
    puller(mirror.url("model.meta4"), adopt_from=[usb])
    assert mirror.bytes_sent("model/weights/w.bin") == 0


def test_all_directories_are_looked_through_in_their_order(
    puller: Puller, mirror: MirrorSimulator, usb: Path, tmp_path: Path
) -> None:
    put(tmp_path / "two/w.bin")
    put(usb / "config.json", MODEL.files["config.json"])
    result = puller(mirror.url("model.meta4"), adopt_from=[usb, tmp_path / "two"])
    assert (result.received_bytes, mirror.bytes_sent("model/")) == (0, 0)


def test_a_file_that_nothing_but_its_size_vouches_for_is_not_adopted(puller: Puller, usb: Path) -> None:
    put(usb / "w.bin")
    with MODEL.serve(MODEL.manifest(piece_length=None, has_sha256=False)) as mirror:
        puller(mirror.url("model.meta4"), adopt_from=[usb], min_assurance=Assurance.SIZE)
        assert mirror.bytes_sent("model/weights/w.bin") == len(WEIGHTS)


def test_a_digest_below_the_floor_does_not_suffice(puller: Puller, usb: Path, tmp_path: Path) -> None:
    put(usb / "w.bin")
    md5 = Digest("md5", hashlib.md5(WEIGHTS).hexdigest())
    with MirrorSimulator({"w.bin": WEIGHTS}) as mirror:
        manifest = PublisherSimulator({"w.bin": WEIGHTS}).manifest([mirror.base_url], has_sha256=False)
        entry = FileEntry("w.bin", len(WEIGHTS), (md5,), None, manifest.files[0].mirrors)
        path = put(tmp_path / "weak.meta4", serialise_metalink(manifest.with_files([entry])))
        puller(str(path), adopt_from=[usb], min_assurance=Assurance.SIZE)
        assert mirror.bytes_sent("w.bin") == 0
        shutil.rmtree(puller.home)
        with pytest.raises(Exception, match="nothing strong enough"):
            puller(str(path), adopt_from=[usb])


def test_below_the_floor_there_are_no_candidates_to_read(usb: Path, tmp_path: Path) -> None:
    put(usb / "w.bin")
    entry = FileEntry("w.bin", len(WEIGHTS), (Digest("md5", hashlib.md5(WEIGHTS).hexdigest()),))
    found = [DirectoryShelf(usb, lambda _: None)]
    assert Adopter(found, Assurance.BTV1, 0).find(entry) == []
    assert len(Adopter(found, Assurance.MD5, 0).find(entry)) == 1


def test_adopted_bytes_count_as_present_when_the_work_is_planned(
    puller: Puller, mirror: MirrorSimulator, usb: Path
) -> None:
    put(usb / "w.bin")
    puller(mirror.url("model.meta4"), adopt_from=[usb])
    (planned,) = puller.of_kind(TransferPlanned)
    assert planned.present_bytes == len(WEIGHTS)


def test_two_files_of_the_same_content_are_adopted_once(puller: Puller, usb: Path) -> None:
    twins = PublisherSimulator({"a.bin": WEIGHTS, "b.bin": WEIGHTS})
    put(usb / "a.bin")
    with twins.serve() as mirror:
        result = puller(mirror.url("model.meta4"), adopt_from=[usb])
    puller.assert_exact(result, twins)
    assert result.received_bytes == 0
    assert len([event for event in puller.of_kind(Notice) if "adopted" in event.text]) == 1


def test_offline_with_a_directory_and_a_manifest_opens_no_source(puller: Puller, usb: Path, tmp_path: Path) -> None:
    for path, content in MODEL.files.items():
        put(usb / path, content)
    manifest = put(tmp_path / "model.meta4", serialise_metalink(MODEL.manifest(["http://127.0.0.1:1"])))
    puller.assert_exact(puller(str(manifest), adopt_from=[usb], offline=True), MODEL)


def test_offline_with_a_directory_that_lacks_a_file_is_refused_and_keeps_what_was_found(
    puller: Puller, usb: Path, tmp_path: Path
) -> None:
    put(usb / "w.bin")
    manifest = put(tmp_path / "model.meta4", serialise_metalink(MODEL.manifest(["http://127.0.0.1:1"])))
    with pytest.raises(OfflineRefused) as caught:
        puller(str(manifest), adopt_from=[usb], offline=True)
    assert caught.value.exit_code == 6
    puller.assert_nothing_published()
    put(usb / "config.json", MODEL.files["config.json"])
    puller.assert_exact(puller(str(manifest), adopt_from=[usb], offline=True), MODEL)
    assert len([event for event in puller.of_kind(Notice) if "w.bin: adopted" in event.text]) == 1


def test_offline_no_swarm_is_joined_for_what_cannot_be_adopted(puller: Puller, usb: Path, tmp_path: Path) -> None:
    publication = MODEL.publish(tmp_path)  # a torrent has no digests of whole files
    with pytest.raises(OfflineRefused):
        puller(str(publication.torrent_path), adopt_from=[tmp_path / "model"], offline=True, peers=("127.0.0.1:9",))


def test_a_manifest_without_any_source_is_enough_beside_a_directory(puller: Puller, usb: Path, tmp_path: Path) -> None:
    for path, content in MODEL.files.items():
        put(usb / path, content)
    bare = [FileEntry(e.path, e.size, e.digests, e.pieces) for e in MODEL.manifest().files]
    manifest = put(tmp_path / "bare.meta4", serialise_metalink(MODEL.manifest().with_files(bare)))
    puller.assert_exact(puller(str(manifest), adopt_from=[usb]), MODEL)


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """Where the tests' HF_HOME leads."""
    return tmp_path / "huggingface/hub"


def test_hugging_face_s_cache_is_looked_into_unasked(puller: Puller, mirror: MirrorSimulator, hub_cache: Path) -> None:
    put(hub_cache / f"models--org--name/blobs/{SHA256}")
    result = puller(mirror.url("model.meta4"))
    puller.assert_exact(result, MODEL)
    assert mirror.bytes_sent("model/weights/w.bin") == 0
    files = json.loads((result.directory / "PROVENANCE.json").read_text())["files"]
    assert files[1]["sources"] == ["adopted from the Hugging Face cache"]


def test_hugging_face_s_cache_is_left_alone_when_told_so(
    puller: Puller, mirror: MirrorSimulator, hub_cache: Path
) -> None:
    put(hub_cache / f"models--org--name/blobs/{SHA256}")
    puller(mirror.url("model.meta4"), hf_cache=False)
    assert mirror.bytes_sent("model/weights/w.bin") == len(WEIGHTS)


def test_small_files_of_the_hub_are_found_by_their_git_id(hub_cache: Path) -> None:
    hasher = new_hash("gitsha1", 5)
    hasher.update(b"hello")
    entry = FileEntry("README.md", 5, (Digest("gitsha1", hasher.hexdigest()),))
    blob = put(hub_cache / "models--o--n/blobs" / hasher.hexdigest(), b"hello")
    assert HubCacheShelf(hub_cache).candidates(entry) == [blob]


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, "~/.cache/huggingface/hub"),
        ({"HF_HOME": "~nobody-is-called-this"}, None),
    ],
)
def test_the_hub_s_cache_is_where_its_own_programs_say(variables: dict[str, str], expected: str | None) -> None:
    assert hub_cache_directory(variables) == (Path(expected).expanduser() if expected else None)


def test_what_the_user_named_comes_before_the_hub_s_cache(tmp_path: Path, hub_cache: Path) -> None:
    hub_cache.mkdir(parents=True)
    found = open_shelves([tmp_path], Settings(home=tmp_path), lambda _: None)
    assert [type(shelf) for shelf in found] == [DirectoryShelf, HubCacheShelf]


def candidates(directory: Path, entry: FileEntry = ENTRY) -> list[str]:
    found = DirectoryShelf(directory, lambda _: None).candidates(entry)
    return [str(path.relative_to(directory)) for path in found]


def test_the_nearest_to_the_promised_path_comes_first(usb: Path) -> None:
    for number, place in enumerate(["x/y/w.bin", SHA256, "m/weights/w.bin", "weights/w.bin"]):
        put(usb / place, WEIGHTS[:-1] + bytes([number]))
    assert candidates(usb) == ["weights/w.bin", SHA256, "m/weights/w.bin", "x/y/w.bin"]


def test_files_of_another_size_are_no_candidates(usb: Path) -> None:
    put(usb / "weights/w.bin", WEIGHTS[:-1])
    put(usb / "w.bin", WEIGHTS + b"\0")
    assert candidates(usb) == []


def test_links_that_go_in_circles_end(usb: Path) -> None:
    put(usb / "a/b/w.bin")
    (usb / "a/b/again").symlink_to(usb)
    (usb / "a/b/c").symlink_to("c")
    events: list[Event] = []
    found = DirectoryShelf(usb, events.append).candidates(ENTRY)
    assert (found, events) == ([usb / "a/b/w.bin"], [])


def test_folders_behind_links_are_not_walked(usb: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/deep/w.bin")
    (usb / "x").mkdir()
    (usb / "x/y").symlink_to(tmp_path / "elsewhere")
    assert candidates(usb) == []


def test_a_link_to_a_file_is_a_candidate_and_one_inode_is_one_only(usb: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere")
    (usb / "w.bin").symlink_to(tmp_path / "elsewhere")
    os.link(tmp_path / "elsewhere", usb / SHA256)
    assert candidates(usb) == [SHA256]
    (usb / SHA256).unlink()
    assert candidates(usb) == ["w.bin"]


def test_a_walk_has_an_end_and_says_so(usb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "MAX_ENTRIES", 20)
    for number in range(30):
        put(usb / f"{number:02}.txt", b"")
    put(usb / "z/z/z/w.bin")
    events: list[Event] = []
    assert DirectoryShelf(usb, events.append).candidates(ENTRY) == []
    assert [event.text for event in events if isinstance(event, Notice)] == [
        f"only the first 20 entries of {usb} were looked at"
    ]


def test_no_more_than_a_few_candidates_are_read(usb: Path) -> None:
    for number in range(shelves.MAX_CANDIDATES + 3):
        put(usb / f"x/{number}/w.bin", WEIGHTS[:-1] + bytes([number]))
    assert len(candidates(usb)) == shelves.MAX_CANDIDATES
