"""What is right of a damaged blob is kept, and the user's own file is never written to."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.errors import Interrupted
from mistral_fetch.events import Event, Notice, ignore_events
from mistral_fetch.manifest import FileEntry, PieceHashes
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.spans import Span
from mistral_fetch.store import salvage
from mistral_fetch.store.blobs import adopt_blob, commit_partial
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partials import Partial
from mistral_fetch.store.salvage import salvage_blob
from tests.store.conftest import add_blobs

PIECE = 64 * 1024
DATA = random.Random(51).randbytes(4 * PIECE + 77)
ENTRY = PublisherSimulator({"w.bin": DATA}).manifest().files[0]
WRONG = bytearray(DATA)
WRONG[PIECE + 3] ^= 1


def damaged(layout: Layout, content: bytes = bytes(WRONG)) -> Path:
    (blob,) = add_blobs(layout, {"w.bin": DATA})
    blob.write_bytes(content)
    blob.chmod(0o444)
    return blob


def partial_of(layout: Layout, entry: FileEntry = ENTRY) -> Partial:
    return Partial(layout.partial("p"), entry.size or 0, entry.pieces)


def save(layout: Layout, entry: FileEntry = ENTRY, events: list[Event] | None = None) -> Partial:
    """Meet the damaged blob as a pull does, and return the partial as it is opened anew."""
    partial, report = partial_of(layout, entry), events.append if events is not None else ignore_events

    def keep(path: Path, hashes: object) -> bool:
        return salvage_blob(path, entry, partial, hashes, report, lambda: None)  # type: ignore[arg-type]

    assert adopt_blob(layout, entry, report, lambda: None, keep) is None
    return partial_of(layout, entry)


def test_all_but_the_bad_piece_is_there_and_the_blob_s_name_is_free(layout: Layout) -> None:
    blob = damaged(layout)
    inode = blob.stat().st_ino
    events: list[Event] = []
    partial = save(layout, events=events)
    assert partial.missing_pieces() == [1]
    assert not blob.exists()
    assert partial.data_path.stat().st_ino == inode  # moved, not copied
    assert stat.S_IMODE(partial.data_path.stat().st_mode) == 0o644
    texts = [event.text for event in events if isinstance(event, Notice)]
    assert texts == ["w.bin: the cache's copy is damaged; 4 of its 5 pieces are right"]


def test_with_the_bad_piece_anew_it_is_the_blob_again(layout: Layout) -> None:
    blob = damaged(layout)
    partial = save(layout)
    partial.put(1, DATA[PIECE : 2 * PIECE], "a mirror")
    commit_partial(layout, ENTRY, partial, ignore_events, lambda: None)
    assert blob.read_bytes() == DATA


@pytest.mark.parametrize(
    "content, missing",
    [
        (DATA[: 2 * PIECE + 5], [2, 3, 4]),
        (DATA + b"more", []),
        (DATA[:PIECE], [1, 2, 3, 4]),
        (bytes(WRONG) + b"more", [1]),
    ],
)
def test_a_blob_of_another_size_is_cut_or_grown(layout: Layout, content: bytes, missing: list[int]) -> None:
    blob = damaged(layout, content)
    partial = save(layout)
    assert partial.missing_pieces() == missing
    assert partial.data_path.stat().st_size == len(DATA)
    assert not blob.exists()


@pytest.mark.parametrize("has_clones", [False, True])
def test_a_file_with_a_second_name_is_never_written_to(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_clones: bool
) -> None:
    def clone(descriptor: int, target: Path) -> bool:
        target.write_bytes(os.pread(descriptor, 10**9, 0))
        return True

    if has_clones:
        monkeypatch.setattr(salvage, "clone_file", clone)
    blob = damaged(layout)
    os.link(blob, tmp_path / "theirs")
    before = (tmp_path / "theirs").stat()
    partial = save(layout)
    assert partial.missing_pieces() == [1]
    assert not blob.exists()
    after = (tmp_path / "theirs").stat()
    assert (tmp_path / "theirs").read_bytes() == bytes(WRONG)
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before.st_mode, before.st_mtime_ns, 1)
    assert not partial.data_path.samefile(tmp_path / "theirs")
    assert sorted({path.name.partition("-")[0] for path in partial.directory.iterdir()}) == ["data", "journal"]


def test_a_blob_that_is_a_link_elsewhere_is_not_written_through(layout: Layout, tmp_path: Path) -> None:
    blob = damaged(layout)
    blob.rename(tmp_path / "other-disk")
    blob.symlink_to(tmp_path / "other-disk")
    partial = save(layout)
    assert partial.missing_pieces() == [1]
    assert (tmp_path / "other-disk").read_bytes() == bytes(WRONG)
    assert not partial.data_path.is_symlink()


def test_bytes_that_the_partial_has_already_are_kept(layout: Layout) -> None:
    partial = partial_of(layout)
    partial.put(1, DATA[PIECE : 2 * PIECE], "a mirror")
    partial.close()
    blob = damaged(layout)
    assert save(layout).missing_pieces() == []
    assert not blob.exists()


PIECES_OF_THE_DAMAGE = tuple(hashlib.sha256(WRONG[i : i + PIECE]).hexdigest() for i in range(0, len(WRONG), PIECE))


@pytest.mark.parametrize(
    "pieces",
    [None, PieceHashes(PIECE, ("0" * 64,) * 5), PieceHashes(PIECE, PIECES_OF_THE_DAMAGE)],
    ids=["no pieces", "no piece is right", "pieces of another file"],
)
def test_where_nothing_can_be_told_to_be_right_the_blob_is_discarded(
    layout: Layout, pieces: PieceHashes | None
) -> None:
    blob = damaged(layout)
    events: list[Event] = []
    partial = save(layout, replace(ENTRY, pieces=pieces), events)
    assert partial.present == []
    assert not blob.exists()
    assert not partial.directory.exists()
    assert any("discarded" in event.text for event in events if isinstance(event, Notice))


def test_data_is_durable_before_it_is_recorded_and_recorded_before_it_is_moved(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = damaged(layout)
    inode, steps = blob.stat().st_ino, []
    fsync, rename = os.fsync, Path.replace

    def watch_fsync(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == inode:
            steps.append("synced")
        elif "journal" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            steps.append("recorded")
        fsync(descriptor)

    def watch_rename(source: Path, target: Path) -> Path:
        steps.append("moved")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "replace", watch_rename)
    save(layout)
    assert steps == ["synced", "recorded", "recorded", "moved"]


def test_records_without_their_data_are_not_believed_after_a_crash(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = damaged(layout)

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(salvage, "rename_durably", cut)
        with pytest.raises(KeyboardInterrupt):
            save(layout)
    assert partial_of(layout).present == []
    assert blob.exists()
    partial = save(layout)
    assert partial.missing_pieces() == [1]
    assert partial.recheck() == []


def test_a_piece_that_changes_while_it_is_copied_is_fetched(layout: Layout, tmp_path: Path) -> None:
    blob = damaged(layout)
    os.link(blob, tmp_path / "theirs")
    partial = partial_of(layout)
    all_good = dict(enumerate(ENTRY.pieces.sha256 if ENTRY.pieces else ()))
    salvage._copy_pieces(blob, partial, all_good, lambda: None)
    assert partial_of(layout).present == [Span(0, PIECE), Span(2 * PIECE, len(DATA))]


def test_a_stop_leaves_the_blob_where_it_is(layout: Layout) -> None:
    blob = damaged(layout, DATA + b"more")
    stop = StopSignal()
    stop.set()
    with pytest.raises(Interrupted):
        salvage_blob(blob, ENTRY, partial_of(layout), None, ignore_events, stop.check)
    assert blob.exists()
