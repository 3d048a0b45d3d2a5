from __future__ import annotations

import hashlib
import os
import random
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.digest import Digest
from mistral_fetch.errors import DigestMismatch, IntegrityError, Interrupted, SizeMismatch
from mistral_fetch.events import BytesVerified, Event, ignore_events
from mistral_fetch.manifest import FileEntry, PieceHashes
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store import blobs
from mistral_fetch.store.blobs import commit_partial, find_blob
from mistral_fetch.store.hashing import FileHashes
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.partials import Partial

PIECE = 64 * 1024
DATA = random.Random(1).randbytes(2 * PIECE + 5)
ENTRY = PublisherSimulator({"w.bin": DATA}).manifest().files[0]


def filled(layout: Layout, entry: FileEntry = ENTRY, data: bytes = DATA) -> Partial:
    """Return a partial whose data file holds ``data``, however it came there."""
    partial = Partial(layout.partial("p"), entry.size or 0, entry.pieces)
    partial.prepare()
    partial.data_path.write_bytes(data)
    return partial


def commit(layout: Layout, partial: Partial, entry: FileEntry = ENTRY) -> CommittedBlob:
    return commit_partial(layout, entry, partial, ignore_events, lambda: None)


def test_a_right_file_becomes_a_read_only_blob_named_by_its_digest(layout: Layout) -> None:
    blob = commit(layout, filled(layout))
    path = find_blob(layout, hashlib.sha256(DATA).hexdigest(), len(DATA))
    assert path is not None
    assert path.read_bytes() == DATA
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert blob == CommittedBlob(hashlib.sha256(DATA).hexdigest(), len(DATA), ENTRY.pieces or PieceHashes(0, ()))


def test_a_file_nobody_gave_a_digest_for_gets_our_own(layout: Layout) -> None:
    entry = FileEntry("w.bin", len(DATA))
    blob = commit(layout, filled(layout, entry), entry)
    assert blob.sha256 == hashlib.sha256(DATA).hexdigest()
    assert blob.pieces == PieceHashes(4 * 1024 * 1024, (blob.sha256,))  # smaller than one of our pieces


def test_an_empty_file_is_a_blob_too(layout: Layout) -> None:
    entry = FileEntry("empty", 0)
    assert commit(layout, filled(layout, entry, b""), entry).size == 0


@pytest.mark.parametrize("at", [0, PIECE, len(DATA) - 1])
def test_one_flipped_bit_is_never_published(layout: Layout, at: int) -> None:
    wrong = bytearray(DATA)
    wrong[at] ^= 1
    partial = filled(layout, data=bytes(wrong))
    with pytest.raises(DigestMismatch) as caught:
        commit(layout, partial)
    assert str(ENTRY.digests[0]) in caught.value.detail
    assert hashlib.sha256(wrong).hexdigest() in caught.value.detail
    assert not layout.blobs.exists()
    assert partial.data_path.read_bytes() == wrong
    assert partial.committed is None


@pytest.mark.parametrize("algorithm", ["md5", "gitsha1", "sha256"])
def test_every_digest_must_match_where_there_is_no_sha256(layout: Layout, algorithm: str) -> None:
    length = {"md5": 32, "gitsha1": 40, "sha256": 64}[algorithm]
    others = tuple(digest for digest in ENTRY.digests if digest.algorithm not in {algorithm, "sha256"})
    entry = replace(ENTRY, digests=(*others, Digest(algorithm, "0" * length)))
    with pytest.raises(DigestMismatch, match="not the file that was promised"):
        commit(layout, filled(layout), entry)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
def test_a_file_of_another_size_is_never_published(layout: Layout, size: int) -> None:
    partial = filled(layout)
    with pytest.raises(SizeMismatch, match=r"w\.bin"):
        commit(layout, partial, replace(ENTRY, size=size, pieces=None))
    assert not layout.blobs.exists()


def test_pieces_that_contradict_the_sha256_are_refused(layout: Layout) -> None:
    assert ENTRY.pieces is not None
    entry = replace(ENTRY, pieces=PieceHashes(PIECE, tuple(reversed(ENTRY.pieces.sha256))))
    with pytest.raises(IntegrityError, match="contradict"):
        commit(layout, filled(layout, entry), entry)


def test_the_partial_says_which_blob_it_became(layout: Layout) -> None:
    partial = filled(layout)
    blob = commit(layout, partial)
    assert Partial(partial.directory, len(DATA), ENTRY.pieces).committed == blob


def test_committing_what_is_already_a_blob_changes_nothing_anybody_sees(layout: Layout) -> None:
    commit(layout, filled(layout))
    commit(layout, filled(layout))
    assert layout.blob(hashlib.sha256(DATA).hexdigest()).read_bytes() == DATA


def test_a_stop_while_hashing_publishes_nothing(layout: Layout) -> None:
    stop = StopSignal()
    stop.set()
    with pytest.raises(Interrupted):
        commit_partial(layout, ENTRY, filled(layout), ignore_events, stop.check)
    assert not layout.blobs.exists()


def test_hashing_is_reported_up_to_the_size(layout: Layout) -> None:
    events: list[Event] = []
    commit_partial(layout, ENTRY, filled(layout), events.append, lambda: None)
    assert events[-1] == BytesVerified("w.bin", len(DATA), len(DATA))


def test_a_blob_that_was_cut_short_is_not_found(layout: Layout) -> None:
    blob = commit(layout, filled(layout))
    path = layout.blob(blob.sha256)
    path.chmod(0o644)
    path.write_bytes(DATA[:-1])
    assert find_blob(layout, blob.sha256, blob.size) is None


def test_a_blob_that_is_a_directory_is_not_found(layout: Layout, tmp_path: Path) -> None:
    layout.blob("0" * 64).mkdir(parents=True)
    assert find_blob(layout, "0" * 64, 10) is None


def test_data_is_synced_before_it_is_hashed_whoever_wrote_it(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    # A swarm writes the file by itself: what is hashed from the page cache must be what the disk will hold.
    partial = filled(layout)
    steps: list[str] = []
    fsync, hash_file = os.fsync, blobs.hash_file

    def watch_fsync(descriptor: int) -> None:
        steps.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def watch_hashing(*arguments: Any) -> FileHashes:
        steps.append("hashed")
        return hash_file(*arguments)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(blobs, "hash_file", watch_hashing)
    commit(layout, partial)
    assert steps[: steps.index("hashed")].count("data") == 1
