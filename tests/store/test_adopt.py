"""One file of this machine becomes a blob, or is left alone and named."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.digest import Digest
from mistral_fetch.errors import Interrupted
from mistral_fetch.events import BytesVerified, Event, Notice
from mistral_fetch.manifest import FileEntry, PieceHashes
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store import adopt
from mistral_fetch.store.adopt import adopt_file
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.partials import Partial

PIECE = 64 * 1024
DATA = random.Random(31).randbytes(2 * PIECE + 5)
ENTRY = PublisherSimulator({"w.bin": DATA}).manifest().files[0]
NAME = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """The user's own file, right and of an odd mode."""
    path = tmp_path / "theirs.bin"
    path.write_bytes(DATA)
    path.chmod(0o640)
    return path


def partial_of(layout: Layout, entry: FileEntry = ENTRY) -> Partial:
    return Partial(layout.partial("p"), entry.size or 0, entry.pieces)


def take(
    layout: Layout, candidate: Path, entry: FileEntry = ENTRY, events: list[Event] | None = None, reserve: int = 0
) -> CommittedBlob | None:
    told = events.append if events is not None else lambda _: None
    return adopt_file(layout, entry, partial_of(layout, entry), candidate, reserve, told, lambda: None)


def refuse(*_: object, **__: object) -> None:
    raise OSError("not here")


def test_a_right_file_becomes_a_blob_with_pieces_and_is_remembered(layout: Layout, theirs: Path) -> None:
    blob = take(layout, theirs)
    assert blob == CommittedBlob(NAME, len(DATA), ENTRY.pieces or PieceHashes(0, ()))
    assert layout.blob(NAME).read_bytes() == DATA
    assert partial_of(layout).committed == blob
    assert [path.name for path in layout.partial("p").iterdir()] == ["committed.json"]


def test_where_blocks_cannot_be_shared_a_hard_link_is_made_and_its_mode_left_alone(
    layout: Layout, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt, "clone_file", lambda *_: False)
    assert take(layout, theirs)
    assert layout.blob(NAME).samefile(theirs)
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o640


def test_a_reflink_is_preferred_and_is_ours_alone(
    layout: Layout, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(descriptor: int, target: Path) -> bool:
        target.write_bytes(os.pread(descriptor, len(DATA), 0))
        return True

    monkeypatch.setattr(adopt, "clone_file", clone)
    events: list[Event] = []
    assert take(layout, theirs, events=events)
    assert not layout.blob(NAME).samefile(theirs)
    assert stat.S_IMODE(layout.blob(NAME).stat().st_mode) == 0o444
    assert [event.text for event in events if isinstance(event, Notice)] == [
        f"w.bin: adopted {theirs} (reflink), nothing to download"
    ]


def test_a_clone_that_fails_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with (tmp_path / "x").open("wb") as file:
        assert adopt.clone_file(file.fileno(), tmp_path / "y") is False
    assert not (tmp_path / "y").exists()


def test_without_links_the_file_is_copied(layout: Layout, theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adopt, "clone_file", lambda *_: False)
    monkeypatch.setattr(os, "link", refuse)
    assert take(layout, theirs)
    assert not layout.blob(NAME).samefile(theirs)
    assert layout.blob(NAME).read_bytes() == DATA
    assert stat.S_IMODE(layout.blob(NAME).stat().st_mode) == 0o444


def test_a_file_that_anybody_may_write_to_is_copied_not_linked(layout: Layout, theirs: Path) -> None:
    theirs.chmod(0o666)
    assert take(layout, theirs)
    assert not layout.blob(NAME).samefile(theirs)


def test_a_file_of_another_user_is_copied_not_linked(
    layout: Layout, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    assert take(layout, theirs)
    assert not layout.blob(NAME).samefile(theirs)


def test_a_copy_that_would_eat_into_the_reserve_is_not_made(
    layout: Layout, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    theirs.chmod(0o666)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, len(DATA) + 9))
    assert take(layout, theirs, reserve=10) is None
    assert take(layout, theirs, reserve=9) is not None


@pytest.mark.parametrize("content", [DATA[:-1] + b"\0", DATA[:-1], DATA + b"\0", b""])
def test_a_wrong_file_is_named_and_left_alone(layout: Layout, theirs: Path, content: bytes) -> None:
    theirs.write_bytes(content)
    events: list[Event] = []
    assert take(layout, theirs, events=events) is None
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.text.startswith(f"w.bin: {theirs} is not adopted: expected ")
    assert theirs.read_bytes() == content
    assert theirs.stat().st_nlink == 1
    assert not layout.blobs.exists()
    assert list(layout.partial("p").iterdir()) == []


@pytest.mark.parametrize("algorithm", ["md5", "gitsha1"])
def test_every_digest_must_match_where_no_sha256_was_promised(layout: Layout, theirs: Path, algorithm: str) -> None:
    wrong = Digest(algorithm, "0" * {"md5": 32, "gitsha1": 40}[algorithm])
    assert take(layout, theirs, replace(ENTRY, digests=(wrong,))) is None


def test_a_file_that_changes_while_it_is_read_is_not_adopted(
    layout: Layout, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_file = adopt.hash_file

    def touch_meanwhile(*arguments, **options):
        hashes = hash_file(*arguments, **options)
        os.utime(theirs, ns=(1, 1))
        return hashes

    monkeypatch.setattr(adopt, "hash_file", touch_meanwhile)
    events: list[Event] = []
    assert take(layout, theirs, events=events) is None
    assert "changed while it was read" in str(events[-1])
    assert not layout.blobs.exists()


def test_a_symbolic_link_is_followed_to_its_file(layout: Layout, theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(theirs)
    assert take(layout, tmp_path / "link")
    assert not layout.blob(NAME).is_symlink()
    assert layout.blob(NAME).read_bytes() == DATA


@pytest.mark.parametrize("kind", ["pipe", "folder", "nothing"])
def test_what_is_no_regular_file_is_not_adopted_and_does_not_hang(layout: Layout, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    {"pipe": os.mkfifo, "folder": Path.mkdir, "nothing": lambda _: None}[kind](path)
    assert take(layout, path) is None


def test_what_a_killed_run_left_is_removed_first(layout: Layout, theirs: Path) -> None:
    left = layout.partial("p") / "adopted-0badc0de"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a copy")
    assert take(layout, theirs)
    assert not left.exists()


def test_bytes_of_the_partial_itself_are_not_touched(layout: Layout, theirs: Path) -> None:
    partial = partial_of(layout)
    partial.put(1, DATA[PIECE : 2 * PIECE], "a mirror")
    partial.close()
    assert take(layout, theirs)
    assert partial_of(layout).present_bytes == PIECE


def test_a_stop_while_hashing_publishes_nothing_and_leaves_nothing(layout: Layout, theirs: Path) -> None:
    stop = StopSignal()
    stop.set()
    with pytest.raises(Interrupted):
        adopt_file(layout, ENTRY, partial_of(layout), theirs, 0, lambda _: None, stop.check)
    assert not layout.blobs.exists()
    assert list(layout.partial("p").iterdir()) == []
    assert theirs.stat().st_nlink == 1


def test_hashing_is_reported(layout: Layout, theirs: Path) -> None:
    events: list[Event] = []
    take(layout, theirs, events=events)
    assert BytesVerified("w.bin", len(DATA), len(DATA)) in events


def test_data_is_durable_before_the_record_and_the_record_before_the_name(
    layout: Layout, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def watch_fsync(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), theirs.stat()):
            steps.append("synced")
        fsync(descriptor)

    def watch_rename(source: Path, target: Path) -> Path:
        steps.append(f"named {Path(target).name}")
        return rename(source, target)

    monkeypatch.setattr(adopt, "clone_file", lambda *_: False)
    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "replace", watch_rename)
    take(layout, theirs)
    assert steps == ["synced", "named committed.json", f"named {NAME}"]
