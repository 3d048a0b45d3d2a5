"""One partial and many threads, and two processes whose lock did not hold them off."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mistral_fetch.errors import StoreError
from mistral_fetch.manifest import PieceHashes
from mistral_fetch.store import journal, partials
from mistral_fetch.store.journal import JournalWriter
from mistral_fetch.store.partials import Partial

PIECE = 64 * 1024
COUNT = 40
DATA = random.Random(31).randbytes((COUNT - 1) * PIECE + 99)
HASHES = PieceHashes(
    PIECE, tuple(hashlib.sha256(DATA[at : at + PIECE]).hexdigest() for at in range(0, len(DATA), PIECE))
)


def piece(index: int) -> bytes:
    return DATA[index * PIECE : (index + 1) * PIECE]


def opened(directory: Path, *, is_pinned: bool = True) -> Partial:
    partial = Partial(directory / "p", len(DATA), HASHES)
    if not is_pinned:
        partial.known_pieces = None
    return partial


def in_threads(count: int, action: Callable[[int], object]) -> None:
    """Do something in so many threads at once; what one raises is raised."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> None:
        barrier.wait(10)
        action(number)

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(begin, number) for number in range(count)]:
            future.result()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets at which something was written."""
    seen: list[int] = []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: (seen.append(offset), pwrite(fd, data, offset))[1])
    return seen


@pytest.mark.parametrize("is_pinned", [True, False])
def test_what_many_threads_put_is_written_once_and_recorded(
    tmp_path: Path, writes: list[int], monkeypatch: pytest.MonkeyPatch, is_pinned: bool
) -> None:
    monkeypatch.setattr(partials, "BATCH_BYTES", 5 * PIECE)
    partial = opened(tmp_path, is_pinned=is_pinned)
    were_missing: list[int] = []

    def put_all(number: int) -> None:
        for index in random.Random(number).sample(range(COUNT), COUNT):
            if partial.put(index, piece(index), f"thread {number}"):
                were_missing.append(index)

    in_threads(8, put_all)
    assert partial.missing_pieces() == []
    partial.close()
    assert sorted(were_missing) == list(range(COUNT))
    assert sorted(writes) == [index * PIECE for index in range(COUNT)]
    assert partial.data_path.read_bytes() == DATA
    assert opened(tmp_path).missing_pieces() == []
    assert opened(tmp_path).recheck() == []


def test_flushing_while_others_put_loses_nothing(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    is_over = threading.Event()

    def flush() -> None:
        while not is_over.is_set():
            partial.flush()

    flusher = threading.Thread(target=flush)
    flusher.start()
    try:
        in_threads(4, lambda number: [partial.put(i, piece(i), "test") for i in range(number, COUNT, 4)])
    finally:
        is_over.set()
        flusher.join()
    assert partial.present_bytes == len(DATA)
    partial.close()
    assert partial.unflushed_bytes == 0
    assert opened(tmp_path).missing_pieces() == []


def test_a_piece_put_during_a_sync_is_not_recorded_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The sync may have begun before its bytes were there: only the next one vouches for them.
    partial = opened(tmp_path)
    partial.put(0, piece(0), "test")
    fdatasync = os.fdatasync

    def sync_late(descriptor: int) -> None:
        fdatasync(descriptor)
        partial.put(1, piece(1), "test")

    with monkeypatch.context() as slow:
        slow.setattr(os, "fdatasync", sync_late)
        partial.flush()
    assert opened(tmp_path).missing_pieces() == list(range(1, COUNT))
    assert partial.unflushed_bytes == PIECE
    partial.close()
    assert opened(tmp_path).missing_pieces() == list(range(2, COUNT))


def test_a_piece_that_one_thread_failed_to_write_may_be_put_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = opened(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(5, "input/output error")))
        with pytest.raises(StoreError):
            partial.put(3, piece(3), "test")
    assert partial.put(3, piece(3), "test")
    partial.close()


def during_the_write(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do something once, between a piece's writing and its being counted."""
    is_done: list[bool] = []

    def reached(name: str) -> None:
        if name == "piece-written" and not is_done:
            is_done.append(True)
            action()

    monkeypatch.setattr(partials, "reached", reached)


def test_bytes_written_into_a_file_that_was_discarded_meanwhile_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = opened(tmp_path), opened(tmp_path)
    ours.put(0, piece(0), "test")

    def discard_and_notice() -> None:
        theirs.reset()
        theirs.put(5, piece(5), "test")
        theirs.close()
        ours.flush()

    during_the_write(monkeypatch, discard_and_notice)
    ours.put(1, piece(1), "test")
    assert 1 in ours.missing_pieces()
    ours.put(2, piece(2), "test")
    ours.close()
    assert opened(tmp_path).missing_pieces() == [i for i in range(COUNT) if i not in {2, 5}]
    assert opened(tmp_path).recheck() == []


def test_bytes_written_before_a_sync_that_failed_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The system reports lost writes once; the next sync succeeds and says nothing about these.
    partial = opened(tmp_path)
    partial.put(0, piece(0), "test")

    def fail_to_sync() -> None:
        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(5, "input/output error")))
            with pytest.raises(StoreError):
                partial.flush()

    during_the_write(monkeypatch, fail_to_sync)
    partial.put(1, piece(1), "test")
    partial.close()
    assert opened(tmp_path).missing_pieces() == list(range(COUNT))


def test_the_file_is_not_closed_under_a_thread_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its number may belong to another file at once, and the piece would be written there.
    partial = opened(tmp_path)
    partial.put(0, piece(0), "test")
    is_writing, may_go_on, closed = threading.Event(), threading.Event(), threading.Event()
    pwrite = os.pwrite

    def write_slowly(descriptor: int, data: memoryview, offset: int) -> int:
        is_writing.set()
        may_go_on.wait(10)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write_slowly)
    with ThreadPoolExecutor(2) as pool:
        putting = pool.submit(partial.put, 1, piece(1), "test")
        is_writing.wait(10)
        closing = pool.submit(lambda: (partial.close_without_recording(), closed.set()))
        assert not closed.wait(0.1)
        may_go_on.set()
        closing.result(10)
        putting.result(10)
    assert partial.missing_pieces() == list(range(COUNT))
    partial.close()


# Two processes at one partial. Another process is a journal with its number in the name.


@pytest.fixture(scope="module")
def living() -> Iterator[int]:
    """The number of a process that lives."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait(30)
    return process.pid


def journal_of(directory: Path, process: int, *, age_seconds: float = 0.0, boot: str = "") -> Path:
    """Leave a journal as if another process had begun to write."""
    (directory / "p").mkdir(exist_ok=True)
    writer = JournalWriter(directory / "p", opened(directory).grid)
    writer.append({0: "a" * 64})
    writer.close()
    path = writer.path.rename(writer.path.with_name(f"journal-{process}-0123abcd.log"))
    if boot:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text(lines[0].rpartition("boot=")[0] + f"boot={boot}\n" + "".join(lines[1:]))
    moment = time.time() - age_seconds
    os.utime(path, (moment, moment))
    return path


def is_private(partial: Partial) -> bool:
    partial.put(1, piece(1), "test")
    return partial.data_path.name != "data"


def test_unpinned_bytes_are_never_mixed_with_those_of_a_living_process(tmp_path: Path, living: int) -> None:
    theirs = journal_of(tmp_path, living)
    ours = opened(tmp_path, is_pinned=False)
    assert is_private(ours)
    assert not (tmp_path / "p" / "data").exists()
    for index in range(COUNT):
        ours.put(index, piece(index), "test")
    ours.close()
    assert ours.missing_pieces() == []
    assert ours.data_path.read_bytes() == DATA
    assert list((tmp_path / "p").glob("journal-*")) == [theirs], "nobody will go on with a private file"


def test_pinned_bytes_may_share_a_file_with_anybody(tmp_path: Path, living: int) -> None:
    journal_of(tmp_path, living)
    assert not is_private(opened(tmp_path))


def test_what_a_dead_process_left_is_gone_on_with(tmp_path: Path, dead: int) -> None:
    journal_of(tmp_path, dead)
    assert not is_private(opened(tmp_path, is_pinned=False))


def test_a_process_that_has_not_written_for_long_is_another_one_of_its_number(tmp_path: Path, living: int) -> None:
    journal_of(tmp_path, living, age_seconds=journal.LIVING_SECONDS + 1)
    assert not is_private(opened(tmp_path, is_pinned=False))


@pytest.mark.parametrize("age_seconds, expected", [(0.0, True), (journal.FOREIGN_SECONDS + 1, False)])
def test_another_host_counts_as_living_for_a_while(
    tmp_path: Path, dead: int, age_seconds: float, expected: bool
) -> None:
    journal_of(tmp_path, dead, age_seconds=age_seconds, boot="another-host")
    assert is_private(opened(tmp_path, is_pinned=False)) is expected


def test_records_of_the_living_process_are_not_taken_for_those_of_the_private_file(tmp_path: Path, living: int) -> None:
    earlier = opened(tmp_path, is_pinned=False)
    earlier.put(0, piece(0), "test")
    earlier.close()
    (log,) = (tmp_path / "p").glob("journal-*")
    log.rename(log.with_name(f"journal-{living}-0123abcd.log"))
    ours = opened(tmp_path, is_pinned=False)
    assert 0 not in ours.missing_pieces()
    assert is_private(ours)
    assert 0 in ours.missing_pieces()
    ours.close()


def test_private_files_of_the_dead_are_removed_and_those_of_the_living_are_not(
    tmp_path: Path, living: int, dead: int
) -> None:
    (tmp_path / "p").mkdir()
    left, used = (tmp_path / "p" / f"data-{process}-0123abcd" for process in (dead, living))
    left.write_bytes(b"x")
    used.write_bytes(b"x")
    assert not is_private(opened(tmp_path, is_pinned=False))
    assert (left.exists(), used.exists()) == (False, True)


def test_removing_an_unfinished_private_file_leaves_the_other_process_its_own(tmp_path: Path, living: int) -> None:
    theirs = journal_of(tmp_path, living)
    (tmp_path / "p" / "data").write_bytes(b"theirs")
    ours = opened(tmp_path, is_pinned=False)
    assert is_private(ours)
    ours.remove()
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["data", theirs.name]


def test_a_journal_without_records_vanishes(tmp_path: Path) -> None:
    partial = opened(tmp_path, is_pinned=False)
    partial.prepare()
    assert len(list((tmp_path / "p").glob("journal-*"))) == 1, "it tells others that somebody is at work"
    partial.close()
    assert list((tmp_path / "p").glob("journal-*")) == []
