from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_fetch.errors import OutOfSpace, PieceMismatch, StoreError, StoreNotWritable
from mistral_fetch.manifest import DEFAULT_PIECE_LENGTH, PieceHashes
from mistral_fetch.spans import Span
from mistral_fetch.store import journal, partials
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.partials import Partial

PIECE = 64 * 1024
DATA = random.Random(3).randbytes(5 * PIECE + 777)
HASHES = PieceHashes(
    PIECE, tuple(hashlib.sha256(DATA[at : at + PIECE]).hexdigest() for at in range(0, len(DATA), PIECE))
)


def piece(index: int) -> bytes:
    return DATA[index * PIECE : (index + 1) * PIECE]


def opened(directory: Path) -> Partial:
    return Partial(directory / "p", len(DATA), HASHES)


def filled(directory: Path, *indices: int) -> Partial:
    partial = opened(directory)
    for index in indices:
        partial.put(index, piece(index), "test")
    partial.close()
    return partial


def test_pieces_in_any_order_become_the_file(tmp_path: Path) -> None:
    partial = filled(tmp_path, 3, 0, 5, 1, 4, 2)
    assert partial.data_path.read_bytes() == DATA
    assert opened(tmp_path).missing_pieces() == []


def test_the_odd_last_piece_is_counted_by_its_own_length(tmp_path: Path) -> None:
    partial = filled(tmp_path, 5, 0)
    assert partial.present_bytes == 777 + PIECE
    assert partial.present == [Span(0, PIECE), Span(5 * PIECE, len(DATA))]


def test_present_bytes_agrees_with_the_spans_before_and_after_flushing(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    for index in (5, 5, 2, 0, 2):
        partial.put(index, piece(index), "test")
        assert partial.present_bytes == sum(span.length for span in partial.present)
        if index == 2:
            partial.flush()
    partial.close()


def test_a_wrong_piece_is_refused_before_it_is_written(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    with pytest.raises(PieceMismatch, match="piece 1") as caught:
        partial.put(1, piece(0), "https://liar.example")
    assert "https://liar.example" in caught.value.what
    assert HASHES.sha256[1] in caught.value.detail
    assert not partial.data_path.exists()


@pytest.mark.parametrize("length", [0, PIECE - 1, PIECE + 1])
def test_a_piece_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ValueError, match="piece 0"):
        opened(tmp_path).put(0, bytes(length), "test")


def test_nothing_on_disk_before_the_first_byte(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    partial.flush()
    partial.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_flushed_is_not_recorded(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    partial.put(0, piece(0), "test")
    assert 0 not in partial.missing_pieces()
    assert 0 in opened(tmp_path).missing_pieces()
    partial.close()
    assert 0 not in opened(tmp_path).missing_pieces()


def test_a_full_batch_flushes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partials, "BATCH_BYTES", 2 * PIECE)
    partial = opened(tmp_path)
    for index in range(3):
        partial.put(index, piece(index), "test")
    assert opened(tmp_path).missing_pieces() == [2, 3, 4, 5]
    partial.close()


def test_data_is_synced_before_it_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fdatasync, append = os.fdatasync, journal.JournalWriter.append
    monkeypatch.setattr(os, "fdatasync", lambda fd: (steps.append("sync"), fdatasync(fd)))
    monkeypatch.setattr(
        journal.JournalWriter, "append", lambda self, pieces: (steps.append("record"), append(self, pieces))
    )
    filled(tmp_path, 0)
    assert steps == ["sync", "record"]


def test_a_failed_sync_is_never_believed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Linux reports lost writes once; a second fdatasync succeeds and means nothing.
    partial = opened(tmp_path)
    partial.put(0, piece(0), "test")
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fails_with(errno.EIO))
        with pytest.raises(StoreError):
            partial.flush()
    partial.close()
    assert 0 in opened(tmp_path).missing_pieces()


@pytest.mark.parametrize(
    "number, error", [(errno.ENOSPC, OutOfSpace), (errno.EDQUOT, OutOfSpace), (errno.EROFS, StoreNotWritable)]
)
def test_a_disk_that_refuses_is_explained_and_nothing_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[StoreError]
) -> None:
    partial = filled(tmp_path, 0)
    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", fails_with(number))
        with pytest.raises(error) as caught:
            partial.put(1, piece(1), "test")
    assert caught.value.exit_code == 9
    partial.close()
    assert opened(tmp_path).missing_pieces() == [1, 2, 3, 4, 5]


def fails_with(number: int) -> object:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_kill_between_data_and_record_costs_the_batch_only(tmp_path: Path) -> None:
    script = f"""
import hashlib, os, random, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from mistral_fetch.manifest import PieceHashes
from mistral_fetch.store import journal
from mistral_fetch.store.partials import Partial
data = random.Random(3).randbytes({len(DATA)})
pieces = [data[at : at + {PIECE}] for at in range(0, len(data), {PIECE})]
hashes = PieceHashes({PIECE}, tuple(hashlib.sha256(piece).hexdigest() for piece in pieces))
partial = Partial(Path({str(tmp_path / "p")!r}), len(data), hashes)
partial.put(0, pieces[0], "test")
partial.flush()
partial.put(1, pieces[1], "test")
journal.JournalWriter.append = lambda self, pieces: os.kill(os.getpid(), 9)
partial.flush()
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert ended.returncode == -9
    assert opened(tmp_path).missing_pieces() == [1, 2, 3, 4, 5]


def test_a_torn_journal_loses_its_tail_only(tmp_path: Path) -> None:
    partial = filled(tmp_path, 0, 1, 2)
    (log,) = partial.directory.glob("journal-*.log")
    log.write_bytes(log.read_bytes()[:-30])
    assert opened(tmp_path).missing_pieces() == [2, 3, 4, 5]


def test_after_a_restart_of_the_host_bytes_are_hashed_before_they_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = filled(tmp_path, 0, 1)
    overwrite(partial, 1 * PIECE + 5)
    assert opened(tmp_path).missing_pieces() == [2, 3, 4, 5]  # the same boot: the record is trusted
    monkeypatch.setattr(journal, "boot_id", lambda: "another")
    assert opened(tmp_path).missing_pieces() == [1, 2, 3, 4, 5]


def test_after_a_restart_pieces_are_hashed_once_not_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, 0, 1)
    monkeypatch.setattr(journal, "boot_id", lambda: "another")
    filled(tmp_path, 2)
    monkeypatch.setattr(Partial, "_hash_on_disk", lambda *_: pytest.fail("hashed again"))
    assert opened(tmp_path).missing_pieces() == [3, 4, 5]


def test_records_of_several_processes_are_joined(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    first.put(0, piece(0), "test")
    second.put(4, piece(4), "test")
    first.close()
    second.close()
    assert opened(tmp_path).missing_pieces() == [1, 2, 3, 5]


def test_a_record_that_the_manifest_contradicts_is_ignored(tmp_path: Path) -> None:
    unpinned = Partial(tmp_path / "p", len(DATA), PieceHashes(PIECE, tuple(reversed(HASHES.sha256))))
    unpinned.known_pieces = None
    unpinned.put(0, piece(1), "test")
    unpinned.close()
    assert 0 in opened(tmp_path).missing_pieces()


def test_another_grid_begins_anew(tmp_path: Path) -> None:
    filled(tmp_path, 0, 1)
    assert Partial(tmp_path / "p", len(DATA)).missing_pieces() == [0]


@pytest.mark.parametrize("length, expected", [(1024, DEFAULT_PIECE_LENGTH), (PIECE, PIECE), (1 << 30, None)])
def test_grids_that_are_too_fine_or_too_coarse_are_not_used(tmp_path: Path, length: int, expected: int | None) -> None:
    partial = Partial(tmp_path / "p", 4096, PieceHashes(length, ("0" * 64,) * -(-4096 // length)))
    assert partial.grid.piece_length == (expected or DEFAULT_PIECE_LENGTH)
    assert (partial.known_pieces is not None) == (length == PIECE)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "emptied"])
def test_records_do_not_outlive_their_data(tmp_path: Path, damage: str) -> None:
    partial = filled(tmp_path, 0, 1)
    if damage == "deleted":
        partial.data_path.unlink()
    else:
        os.truncate(partial.data_path, 0 if damage == "emptied" else PIECE)
    assert opened(tmp_path).missing_pieces() == [0, 1, 2, 3, 4, 5]
    filled(tmp_path, 4)  # makes the data file whole again: old records must not come back to life
    assert opened(tmp_path).missing_pieces() == [0, 1, 2, 3, 5]


def test_reset_forgets_everything(tmp_path: Path) -> None:
    partial = filled(tmp_path, 0, 1)
    partial.set_validator('"v1"')
    partial.reset()
    assert partial.missing_pieces() == [0, 1, 2, 3, 4, 5]
    assert partial.validator == ""
    assert opened(tmp_path).missing_pieces() == [0, 1, 2, 3, 4, 5]
    assert list(partial.directory.iterdir()) == []


def test_reset_removes_records_before_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = filled(tmp_path, 0)
    partial.set_validator('"v1"')
    removed: list[str] = []
    unlink = Path.unlink

    def watch(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name.partition("-")[0])
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watch)
    partial.reset()
    assert removed[0] == "journal"
    assert sorted(removed[1:]) == ["data", "validator"]


def test_bytes_for_a_discarded_file_are_not_recorded(tmp_path: Path) -> None:
    ours, theirs = opened(tmp_path), opened(tmp_path)
    ours.put(0, piece(0), "test")
    theirs.reset()
    theirs.put(3, piece(3), "test")
    theirs.close()
    ours.flush()  # its data file has no name any more
    assert ours.missing_pieces() == [0, 1, 2, 4, 5]
    ours.put(1, piece(1), "test")
    ours.close()
    reopened = opened(tmp_path)
    assert reopened.missing_pieces() == [0, 2, 4, 5]
    assert reopened.recheck() == []


def test_recheck_finds_what_rotted_and_forgets_it(tmp_path: Path) -> None:
    partial = filled(tmp_path, 0, 1, 2, 5)
    overwrite(partial, PIECE)
    overwrite(partial, 5 * PIECE + 3)
    reopened = opened(tmp_path)
    assert reopened.recheck() == [Span(PIECE, 2 * PIECE), Span(5 * PIECE, len(DATA))]
    assert reopened.missing_pieces() == [1, 3, 4, 5]
    reopened.close()
    assert opened(tmp_path).missing_pieces() == [1, 3, 4, 5]


def test_recheck_of_a_vanished_file_finds_everything_bad(tmp_path: Path) -> None:
    filled(tmp_path, 0, 1)
    reopened = opened(tmp_path)
    reopened.data_path.unlink()
    assert reopened.recheck() == [Span(0, 2 * PIECE)]


def test_the_validator_survives(tmp_path: Path) -> None:
    opened(tmp_path).set_validator('"abc"')
    assert opened(tmp_path).validator == '"abc"'


def test_committed_survives_and_torn_means_not_committed(tmp_path: Path) -> None:
    blob = CommittedBlob("a" * 64, len(DATA), HASHES)
    partial = filled(tmp_path, 0)
    partial.set_committed(blob)
    assert opened(tmp_path).committed == blob
    file = partial.directory / "committed.json"
    file.write_bytes(file.read_bytes()[:20])
    assert opened(tmp_path).committed is None


def test_an_empty_file_is_complete_once_prepared(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "empty", 0)
    partial.prepare()
    partial.close()
    assert partial.missing_pieces() == []
    assert partial.present_bytes == 0
    assert partial.data_path.read_bytes() == b""


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    filled(tmp_path, 0, 1)
    discarded = opened(tmp_path)
    discarded.put(2, piece(2), "test")
    discarded.flush()
    discarded.remove()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not discarded.directory.exists()


def overwrite(partial: Partial, offset: int) -> None:
    """Damage one byte behind the partial's back."""
    with partial.data_path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
