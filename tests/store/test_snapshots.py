from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from mistral_fetch.errors import IntegrityError, StoreError
from mistral_fetch.manifest import ModelInfo
from mistral_fetch.store import snapshots
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import (
    RefRecord,
    find_drafts,
    find_refs,
    find_snapshot,
    list_refs,
    load_manifest,
    load_provenance,
    write_ref,
    write_snapshot,
)
from tests.store.conftest import Keep, add_blobs, manifest_of

FILES = {"weights/a/w.bin": b"w" * 1000, "config.json": b"{}"}


def test_a_snapshot_holds_the_files_by_name(keep: Keep) -> None:
    directory = keep(FILES)
    assert {path: (directory / path).read_bytes() for path in FILES} == FILES


def test_links_are_relative_so_a_cache_can_be_moved(keep: Keep, layout: Layout, tmp_path: Path) -> None:
    directory = keep(FILES)
    assert not (directory / "weights/a/w.bin").readlink().is_absolute()
    layout.home.rename(tmp_path / "moved")
    moved = Layout(tmp_path / "moved")
    assert find_snapshot(moved, directory.name) == moved.snapshot(directory.name)
    assert (moved.snapshot(directory.name) / "weights/a/w.bin").read_bytes() == FILES["weights/a/w.bin"]


def test_the_name_is_the_content_digest(keep: Keep) -> None:
    assert keep(FILES).name == manifest_of(FILES).content_digest().value


def test_the_manifest_comes_back(keep: Keep) -> None:
    assert [(e.path, e.size, e.sha256) for e in load_manifest(keep(FILES)).files] == [
        (e.path, e.size, e.sha256) for e in manifest_of(FILES).files
    ]


def test_the_licence_text_lies_beside_the_weights(keep: Keep) -> None:
    text = (keep(FILES, info=ModelInfo(licence="Apache-2.0")) / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0" in text


def test_a_licence_file_the_model_brings_is_kept(keep: Keep) -> None:
    directory = keep({**FILES, "LICENSE": b"mine"}, info=ModelInfo(licence="Apache-2.0"))
    assert (directory / "LICENSE").read_bytes() == b"mine"


def test_no_licence_is_invented(keep: Keep) -> None:
    assert not (keep(FILES, info=ModelInfo(licence="LicenseRef-Research")) / "LICENSE").exists()


def test_complete_is_written_last(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    add_blobs(layout, FILES)
    written: list[str] = []
    durably = snapshots.write_durably

    def watch(path: Path, data: bytes, mode: int = 0o644) -> None:
        written.append(path.name)
        assert all((path.parent / name).exists() for name in [*FILES, *written[:-1]])
        durably(path, data, mode)

    monkeypatch.setattr(snapshots, "write_durably", watch)
    write_snapshot(layout, manifest_of(FILES), {})
    assert written == ["LICENSE", "manifest.meta4", "PROVENANCE.json", ".complete"]


def test_nobody_sees_a_snapshot_before_it_is_whole(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    add_blobs(layout, FILES)
    digest = manifest_of(FILES).content_digest().value
    durably = snapshots.write_durably
    seen: list[bool] = []

    def watch(path: Path, data: bytes, mode: int = 0o644) -> None:
        durably(path, data, mode)
        seen.append(layout.snapshot(digest).exists())

    monkeypatch.setattr(snapshots, "write_durably", watch)
    write_snapshot(layout, manifest_of(FILES), {})
    assert seen == [False] * 4
    assert find_snapshot(layout, digest) is not None


def test_a_missing_blob_makes_no_snapshot(layout: Layout) -> None:
    add_blobs(layout, {"config.json": FILES["config.json"]})
    with pytest.raises(StoreError, match="not complete") as caught:
        write_snapshot(layout, manifest_of(FILES), {})
    assert "weights/a/w.bin" in caught.value.detail
    assert list(layout.snapshots.iterdir()) == []


@pytest.mark.parametrize("damage", ["gone", "torn", "a list", "no sizes", "a blob short", "a blob gone"])
def test_a_damaged_snapshot_is_not_found_and_is_made_again(keep: Keep, layout: Layout, damage: str) -> None:
    directory = keep(FILES)
    complete, blob = directory / ".complete", (directory / "config.json").resolve()
    blob.chmod(0o644)
    {
        "gone": lambda: complete.unlink(),
        "torn": lambda: complete.write_text('{"sizes": {'),
        "a list": lambda: complete.write_text("[]"),
        "no sizes": lambda: complete.write_text('{"sizes": []}'),
        "a blob short": lambda: blob.write_bytes(b"{"),
        "a blob gone": lambda: blob.unlink(),
    }[damage]()
    assert find_snapshot(layout, directory.name) is None
    blob.write_bytes(FILES["config.json"])
    again = keep(FILES)
    assert find_snapshot(layout, directory.name) == again
    assert {path: (again / path).read_bytes() for path in FILES} == FILES


def test_a_changed_manifest_is_noticed(keep: Keep) -> None:
    directory = keep(FILES)
    manifest = directory / "manifest.meta4"
    manifest.write_bytes(manifest.read_bytes().replace(b"config.json", b"konfig.json"))
    with pytest.raises(IntegrityError, match="was changed") as caught:
        load_manifest(directory)
    assert caught.value.exit_code == 32


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", None])
def test_unreadable_provenance_is_an_error_of_the_store(keep: Keep, content: bytes | None) -> None:
    path = keep(FILES) / "PROVENANCE.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError):
        load_provenance(path.parent)


def test_two_processes_that_lay_out_the_same_model_both_get_it(layout: Layout) -> None:
    add_blobs(layout, FILES)
    barrier = threading.Barrier(4)
    found: list[Path | BaseException] = []

    def lay_out() -> None:
        barrier.wait()
        try:
            found.append(write_snapshot(layout, manifest_of(FILES), {}))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=lay_out) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    final = layout.snapshot(manifest_of(FILES).content_digest().value)
    assert found == [final] * 4
    assert [path.name for path in layout.snapshots.iterdir()] == [final.name]
    assert find_snapshot(layout, final.name) == final


def test_a_complete_snapshot_is_never_taken_away_by_a_slower_process(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_blobs(layout, FILES)
    fill = snapshots._fill
    faster: list[Path] = []

    def overtaken(*arguments: object) -> None:
        fill(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(snapshots, "_fill", fill)
        faster.append(write_snapshot(layout, manifest_of(FILES), {"by": "the faster one"}))

    monkeypatch.setattr(snapshots, "_fill", overtaken)
    assert write_snapshot(layout, manifest_of(FILES), {"by": "the slower one"}) == faster[0]
    assert load_provenance(faster[0]) == {"by": "the faster one"}


def test_a_dead_process_s_draft_is_cleared_away(layout: Layout) -> None:
    add_blobs(layout, FILES)
    digest = manifest_of(FILES).content_digest().value
    draft = layout.snapshots / f".{digest[:16]}-0123456789ab.tmp"
    (draft / "weights").mkdir(parents=True)
    assert find_drafts(layout, digest) == [draft]
    write_snapshot(layout, manifest_of(FILES), {})
    assert not draft.exists()


def test_without_symbolic_links_hard_links_and_copies_do(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    hard = keep(FILES, "hard")
    assert not (hard / "config.json").is_symlink()
    assert (hard / "config.json").stat().st_nlink == 2
    shutil.rmtree(hard)
    monkeypatch.setattr(os, "link", refuse)
    copied = keep(FILES, "copied")
    assert (copied / "config.json").stat().st_nlink == 1
    assert {path: (copied / path).read_bytes() for path in FILES} == FILES


def test_refs_come_back_newest_first(layout: Layout) -> None:
    for age, channel in enumerate(["hub", "torrent", "manifest"]):
        write_ref(layout, RefRecord("name@v1", channel, "0" * 64, 1000 - age))
    assert [record.channel for record in find_refs(layout, "name@v1")] == ["hub", "torrent", "manifest"]
    assert list_refs(layout) == find_refs(layout, "name@v1")


@pytest.mark.parametrize("key", ["../../etc/passwd", "a/b/c", "..", ".", "magnet:?xt=urn:btih:" + "0" * 40, "é" * 300])
def test_a_hostile_ref_key_stays_one_name_in_the_refs_folder(layout: Layout, key: str) -> None:
    record = RefRecord(key, "hub", "0" * 64, 5)
    write_ref(layout, record)
    assert find_refs(layout, key) == [record]
    (folder,) = layout.refs.iterdir()
    assert layout.ref(key, "hub").resolve().parent.parent == layout.refs.resolve()
    assert folder.is_dir()
    assert sorted(path.name for path in layout.home.iterdir()) == ["VERSION", "refs"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'"x"', b'{"ref": "m"}', b'{"ref":"m","snapshot":"0","pulled_at":"x"}']
)
def test_a_torn_ref_names_nothing(layout: Layout, content: bytes) -> None:
    path = layout.ref("m", "hub")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert list_refs(layout) == []


def test_a_killed_writer_s_temporary_file_is_no_ref(layout: Layout) -> None:
    write_ref(layout, RefRecord("m", "hub", "0" * 64, 5))
    shutil.copy(layout.ref("m", "hub"), layout.ref("m", "hub").parent / ".hub.0123456789ab.tmp")
    assert [record.channel for record in list_refs(layout)] == ["hub"]


def test_provenance_is_json_that_people_can_read(keep: Keep) -> None:
    assert json.loads((keep(FILES, "naïve") / "PROVENANCE.json").read_text("utf-8")) == {"name": "naïve"}
