"""What goes into a bundle comes out of it, and standard tar reads it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from mistral_fetch.bundle.tar import MAX_USTAR_SIZE, file_header, link_header
from mistral_fetch.errors import Conflict, ExitCode, IntegrityError, OutOfSpace
from mistral_fetch.events import BytesReceived, Event
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import load_manifest, load_provenance
from mistral_fetch.transfer.local import LocalModel
from tests.bundle.conftest import FILES, PIECE, REF, Receiver, bundle_of, keep


@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
def test_a_model_arrives_whole_and_says_how(model: LocalModel, bundle: bytes, receive: Receiver, piped: bool) -> None:
    result = receive(bundle, piped=piped)
    receive.assert_exact(result)
    assert (result.key, result.channel, result.was_complete, result.assurance) == (REF, "manifest", False, "sha256")
    papers = load_provenance(result.directory)
    assert papers["carried_by"] == "bundle"
    assert (papers["ref"], papers["identity"]) == (REF, "manifest-1")
    assert {source for file in papers["files"] for source in file["sources"]} <= {"bundle", "this cache"}
    there, here = load_manifest(result.directory), load_manifest(model.directory)
    assert there.info == here.info
    assert there.content_digest() == here.content_digest()
    assert [e.pieces for e in there.files if e.size] == [e.pieces for e in here.files if e.size]


@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
def test_a_second_import_does_nothing(bundle: bytes, receive: Receiver, piped: bool) -> None:
    first = receive(bundle)
    before = {path: path.lstat().st_mtime_ns for path in receive.home.rglob("*") if "locks" not in path.parts}
    again = receive(bundle, piped=piped)
    assert again.was_complete
    assert again.directory == first.directory
    after = {path: path.lstat().st_mtime_ns for path in receive.home.rglob("*") if "locks" not in path.parts}
    assert after == before


def test_the_same_model_gives_the_same_bytes_in_any_order_and_from_any_cache(tmp_path: Path, bundle: bytes) -> None:
    others = [
        keep(tmp_path / "second", FILES, REF),
        keep(tmp_path / "second", {"b.bin": b"b"}, "other.meta4#fedcba9876543210"),
    ]
    assert bundle_of(others[0]) == bundle
    assert bundle_of(*others) == bundle_of(*reversed(others), others[0])


@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
def test_models_that_share_a_file_carry_it_once(tmp_path: Path, receive: Receiver, piped: bool) -> None:
    shared = FILES["weights/w.bin"]
    models = [
        keep(tmp_path / "from", {"w.bin": shared, f"{n}.txt": n.encode()}, f"https://site.example/{n}.meta4")
        for n in ("one", "two")
    ]
    data = bundle_of(*models)
    assert data.count(shared) == 1
    results = receive.all(data, piped=piped)
    assert [Path(result.key).stem for result in results] == ["one", "two"]
    assert {(result.directory / "w.bin").read_bytes() for result in results} == {shared}


def test_tar_lists_and_unpacks_it_and_the_result_verifies_itself(tmp_path: Path, bundle: bytes) -> None:
    (tmp_path / "b.tar").write_bytes(bundle)
    subprocess.run(["tar", "xf", "b.tar"], cwd=tmp_path, check=True, capture_output=True)
    folder = tmp_path / "tiny-v1"
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert (folder / "LICENSE").read_text().lstrip().startswith("Apache License")
    contents = json.loads((tmp_path / "contents.json").read_text())
    for document in contents["models"][0]["documents"]:
        data = (folder / document["path"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (document["sha256"], document["size"])


def test_pythons_tar_sees_the_same_members(bundle: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(bundle)) as archive:
        members = archive.getmembers()
    assert [member.name for member in members][:2] == ["bundle.json", "contents.json"]
    assert members[-1].name == "bundle.end"
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    assert [(m.name, m.linkname) for m in members if not m.isreg()] == [
        ("tiny-v1/params.json", "tiny-v1/again.json"),
    ]


def first_member(header: bytes) -> tarfile.TarInfo:
    """Return what Python's tar makes of a header."""
    with tarfile.open(fileobj=io.BytesIO(header + bytes(1024))) as archive:
        found = archive.next()
    assert found is not None
    return found


@pytest.mark.parametrize("size", [0, 511, 512, MAX_USTAR_SIZE, MAX_USTAR_SIZE + 1, 13_400_000_000])
@pytest.mark.parametrize("name", ["a", "d/" + "n" * 98, "d/" + "n" * 99, "ü", "d/" + "ü" * 120])
def test_headers_mean_to_others_what_they_mean_to_us(size: int, name: str) -> None:
    found, link = first_member(file_header(name, size)), first_member(link_header("x", name))
    assert (found.name, found.size, found.type) == (name, size, tarfile.REGTYPE)
    assert (link.name, link.linkname, link.type) == ("x", name, tarfile.LNKTYPE)


@pytest.mark.skipif(shutil.which("tar") is None, reason="tar is not installed")
def test_tar_knows_files_beyond_eight_gib(tmp_path: Path) -> None:
    size = 9 * 2**30
    with (tmp_path / "large.tar").open("wb") as file:
        file.write(file_header("large.bin", size))
        file.seek(size, 1)
        file.write(file_header("after.txt", 0) + bytes(1024))
    listed = subprocess.run(["tar", "tvf", "large.tar"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert [(line.split()[2], line.split()[-1]) for line in listed.stdout.splitlines()] == [
        (str(size), "large.bin"),
        ("0", "after.txt"),
    ]


def test_a_name_that_stands_for_another_model_is_not_taken_unasked(
    tmp_path: Path, bundle: bytes, receive: Receiver
) -> None:
    mine = keep(receive.home, {"mine.bin": b"mine"}, REF)
    with pytest.raises(Conflict) as refused:
        receive(bundle)
    assert "--replace" in refused.value.hint
    assert not list(receive.home.glob("partial/*"))
    assert Layout(receive.home).snapshot(mine.record.content_digest).is_dir()
    receive.assert_exact(receive(bundle, replace_names=True))


def test_pieces_that_are_here_are_not_read_again_from_a_file(bundle: bytes, receive: Receiver) -> None:
    at = bundle.index(FILES["weights/w.bin"])
    wrong = bytearray(bundle)
    wrong[at + 2 * PIECE + 5] ^= 1
    with pytest.raises(IntegrityError):
        receive(bytes(wrong))
    events: list[Event] = []
    receive.assert_exact(receive.all(bundle, report=events.append)[0])
    read = [e.length for e in events if isinstance(e, BytesReceived) and e.path == "weights/w.bin"]
    assert read in ([PIECE], [PIECE, 77]), "the last one may have been taken beside the wrong one"


def test_a_damaged_cache_is_not_handed_on(tmp_path: Path, model: LocalModel) -> None:
    blob = Layout(tmp_path / "from").blob(hashlib.sha256(FILES["weights/w.bin"]).hexdigest())
    blob.write_bytes(FILES["weights/w.bin"][:-1] + b"!")
    with pytest.raises(IntegrityError) as refused:
        bundle_of(model)
    assert "piece 3" in refused.value.detail
    assert "weights/w.bin" in refused.value.what


def test_a_disk_that_cannot_hold_it_is_told_before_the_first_byte(bundle: bytes, receive: Receiver) -> None:
    with pytest.raises(OutOfSpace) as refused:
        receive.all(bundle, disk_reserve=1 << 60)
    assert refused.value.exit_code is ExitCode.DISK
    receive.assert_nothing_published()
    assert list(receive.home.glob("partial/*/data")) == []
