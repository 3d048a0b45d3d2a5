"""Hashing files while they are filled: the hashes are those of the bytes on the disk, whatever happens meanwhile."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_fetch.errors import Interrupted
from mistral_fetch.manifest import PieceHashes
from mistral_fetch.store import follower as following
from mistral_fetch.store.follower import PrefixFollower
from mistral_fetch.store.hashing import FileHashes, hash_file
from mistral_fetch.store.partials import Partial

PIECE = 64 * 1024
DATA = random.Random(21).randbytes(23 * PIECE + 501)
COUNT = 24


def hashes_of(data: bytes) -> PieceHashes:
    return PieceHashes(
        PIECE, tuple(hashlib.sha256(data[at : at + PIECE]).hexdigest() for at in range(0, len(data), PIECE))
    )


def opened(directory: Path, data: bytes = DATA) -> Partial:
    return Partial(directory, len(data), hashes_of(data))


def put(partial: Partial, *indices: int, data: bytes = DATA) -> None:
    for index in indices:
        partial.put(index, data[index * PIECE : (index + 1) * PIECE], "test")


def ignore(_: int) -> None:
    """Wait without looking."""


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def hashed_bytes(follower: PrefixFollower) -> int:
    return follower._files[0].position


def assert_right(hashes: FileHashes | None, data: bytes = DATA) -> None:
    assert hashes is not None
    assert hashes.size == len(data)
    assert hashes.digest("sha256").value == hashlib.sha256(data).hexdigest()
    assert hashes.pieces == hashes_of(data)


@pytest.mark.parametrize("seed", range(4))
def test_hashes_are_the_file_s_whatever_the_order_of_its_pieces(tmp_path: Path, seed: int) -> None:
    order = random.Random(seed).sample(range(COUNT), COUNT)
    partial = opened(tmp_path)
    with PrefixFollower([(partial, {"md5"})]) as follower:
        put(partial, *order)
        hashes = follower.finish(partial, ignore)
    partial.close()
    assert_right(hashes)
    assert hashes is not None
    assert hashes.digest("md5").value == hashlib.md5(DATA).hexdigest()
    again = hash_file(partial.data_path, ["md5", "sha256"], PIECE)
    assert (again.size, set(again.digests), again.pieces) == (hashes.size, set(hashes.digests), hashes.pieces)


def test_the_follower_is_near_the_end_before_it_is_asked(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    with PrefixFollower([(partial, ())]) as follower:
        put(partial, *range(COUNT - 1))
        eventually(lambda: hashed_bytes(follower) == (COUNT - 1) * PIECE)
        put(partial, COUNT - 1)
        eventually(lambda: hashed_bytes(follower) == len(DATA))
        assert_right(follower.finish(partial, lambda _: pytest.fail("there was nothing to wait for")))
    partial.close()


def test_a_gap_is_never_hashed_over(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    with PrefixFollower([(partial, ())]) as follower:
        put(partial, 0, 1, 3, 4)
        eventually(lambda: hashed_bytes(follower) == 2 * PIECE)
        time.sleep(0.05)
        assert hashed_bytes(follower) == 2 * PIECE
        assert follower.finish(partial, ignore) is None, "it is not complete"
    partial.close()


def test_pieces_of_an_earlier_process_are_followed_too(tmp_path: Path) -> None:
    earlier = opened(tmp_path)
    put(earlier, *range(0, COUNT, 2))
    earlier.close()
    partial = opened(tmp_path)
    with PrefixFollower([(partial, ())]) as follower:
        put(partial, *range(1, COUNT, 2))
        assert_right(follower.finish(partial, ignore))
    partial.close()


@pytest.mark.parametrize("changed", [0, 7, COUNT - 1])
def test_an_earlier_piece_that_changed_on_disk_vouches_for_nothing(tmp_path: Path, changed: int) -> None:
    earlier = opened(tmp_path)
    put(earlier, *range(COUNT))
    earlier.close()
    with earlier.data_path.open("r+b") as file:
        file.seek(changed * PIECE + 5)
        byte = file.read(1)
        file.seek(changed * PIECE + 5)
        file.write(bytes([byte[0] ^ 1]))
    partial = opened(tmp_path)
    with PrefixFollower([(partial, ())]) as follower:
        assert follower.finish(partial, ignore) is None, "so that it is hashed again, found wrong and rechecked"
    partial.close()


def test_what_changes_on_disk_after_it_was_put_shows_in_the_digest(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    put(partial, *range(COUNT))
    with partial.data_path.open("r+b") as file:
        file.seek(9)
        file.write(b"changed")
    with PrefixFollower([(partial, ())]) as follower:
        hashes = follower.finish(partial, ignore)
    partial.close()
    assert hashes is not None
    assert hashes.digest("sha256").value == hashlib.sha256(partial.data_path.read_bytes()).hexdigest()


def test_after_a_reset_only_the_new_bytes_count(tmp_path: Path) -> None:
    other = random.Random(22).randbytes(len(DATA))
    partial = opened(tmp_path)
    partial.known_pieces = None
    with PrefixFollower([(partial, ())]) as follower:
        put(partial, *range(12), data=other)
        eventually(lambda: hashed_bytes(follower) == 12 * PIECE)
        partial.reset()
        put(partial, *range(COUNT))
        assert_right(follower.finish(partial, ignore))
    partial.close()


def test_a_reset_after_the_last_piece_was_hashed_is_noticed(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    partial.known_pieces = None
    other = bytes(len(DATA))
    with PrefixFollower([(partial, ())]) as follower:
        put(partial, *range(COUNT), data=other)
        assert_right(follower.finish(partial, ignore), other)
        partial.reset()
        assert follower.finish(partial, ignore) is None
        put(partial, *range(COUNT))
        assert_right(follower.finish(partial, ignore))
    partial.close()


def test_a_file_that_is_discarded_between_a_look_and_its_opening_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = opened(tmp_path)
    put(partial, 0, 1)
    opens, open_file = [], os.open

    def open_late(path: Path, flags: int, *mode: int) -> int:
        if path == partial.data_path and threading.current_thread().name == "prefix-hasher" and not opens:
            partial.reset()
            opens.append(path)
        return open_file(path, flags, *mode)

    monkeypatch.setattr(following.os, "open", open_late)
    with PrefixFollower([(partial, ())]) as follower:
        eventually(lambda: bool(opens))
        put(partial, *range(COUNT))
        assert_right(follower.finish(partial, ignore))
    partial.close()


def test_many_resets_while_pieces_come_never_lead_to_a_wrong_hash(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    partial.known_pieces = None
    chance = random.Random(5)
    with PrefixFollower([(partial, ())]) as follower:
        for round_number in range(15):
            data = random.Random(round_number).randbytes(len(DATA))
            order = chance.sample(range(COUNT), COUNT) if round_number % 2 else range(COUNT)
            put(partial, *order, data=data)
            if chance.random() < 0.5:
                assert_right(follower.finish(partial, ignore), data)
            partial.reset()
        put(partial, *range(COUNT))
        assert_right(follower.finish(partial, ignore))
    partial.close()


def test_several_files_are_followed_whichever_comes_first(tmp_path: Path) -> None:
    contents = [DATA, random.Random(3).randbytes(3 * PIECE), b"small", b""]
    partials = [opened(tmp_path / str(number), data) for number, data in enumerate(contents)]
    with PrefixFollower([(partial, {"md5"}) for partial in partials]) as follower:
        for partial, data in reversed(list(zip(partials, contents, strict=True))):
            put(partial, *range(partial.grid.count), data=data)
        for partial, data in zip(partials, contents, strict=True):
            assert_right(follower.finish(partial, ignore), data)
            partial.close()


def test_a_file_that_nobody_follows_has_no_hashes(tmp_path: Path) -> None:
    followed, other = opened(tmp_path / "a"), opened(tmp_path / "b")
    put(other, *range(COUNT))
    with PrefixFollower([(followed, ())]) as follower:
        assert follower.finish(other, ignore) is None
    other.close()


def test_a_source_that_writes_behind_our_back_is_not_followed(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    with PrefixFollower([(partial, ())]) as follower:
        partial.prepare()
        partial.data_path.write_bytes(DATA)
        time.sleep(0.05)
        assert hashed_bytes(follower) == 0
        assert follower.finish(partial, ignore) is None
    partial.close()


def test_a_file_that_shrinks_is_an_error_for_who_waits(tmp_path: Path) -> None:
    partial = opened(tmp_path)
    put(partial, *range(COUNT))
    os.truncate(partial.data_path, 2 * PIECE)
    with PrefixFollower([(partial, ())]) as follower, pytest.raises(OSError, match="became shorter"):
        follower.finish(partial, ignore)
    partial.close_without_recording()


def test_whatever_goes_wrong_while_hashing_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = opened(tmp_path)
    put(partial, *range(COUNT))
    monkeypatch.setattr(partial, "piece_sha256", lambda _: 1 / 0)
    with PrefixFollower([(partial, ())]) as follower, pytest.raises(ZeroDivisionError):
        follower.finish(partial, ignore)
    partial.close()


def test_waiting_can_be_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = opened(tmp_path)
    put(partial, *range(COUNT))
    is_held = threading.Event()
    hash_piece = PrefixFollower._hash_piece
    monkeypatch.setattr(PrefixFollower, "_hash_piece", lambda *parts: (is_held.wait(10), hash_piece(*parts)))

    def stop(_: int) -> None:
        raise Interrupted("stopped", detail="", hint="")

    with PrefixFollower([(partial, ())]) as follower:
        with pytest.raises(Interrupted):
            follower.finish(partial, stop)
        is_held.set()
    partial.close()


def test_its_end_waits_for_one_piece_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = opened(tmp_path)
    put(partial, *range(COUNT))
    hashed: list[int] = []
    hash_piece = PrefixFollower._hash_piece

    def hash_slowly(self: PrefixFollower, file: following._Progress, descriptor: int) -> None:
        time.sleep(0.05)
        hash_piece(self, file, descriptor)
        hashed.append(1)

    monkeypatch.setattr(PrefixFollower, "_hash_piece", hash_slowly)
    with PrefixFollower([(partial, ())]) as follower:
        eventually(lambda: len(hashed) >= 1)
    assert len(hashed) < COUNT // 2
    assert not follower._thread.is_alive()
    partial.close()


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    partial = opened(tmp_path)
    with PrefixFollower([(partial, ())]) as follower:
        put(partial, *range(COUNT))
        follower.finish(partial, ignore)
    partial.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
