from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from mistral_fetch.manifest import PieceHashes
from mistral_fetch.spans import Span
from mistral_fetch.store import hashing
from mistral_fetch.store.hashing import find_bad_pieces, hash_file

DATA = random.Random(4).randbytes(100_003)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hashing, "READ_BYTES", 4096)
    (tmp_path / "f").write_bytes(DATA)
    return tmp_path / "f"


def pieces_of(data: bytes, length: int) -> PieceHashes:
    return PieceHashes(
        length, tuple(hashlib.sha256(data[at : at + length]).hexdigest() for at in range(0, len(data), length))
    )


@pytest.mark.parametrize("length", [1, 100, 4096, 5000, len(DATA), 10**6])
def test_one_pass_gives_every_digest_and_the_pieces_of_any_grid(file: Path, length: int) -> None:
    if length == 1:
        file.write_bytes(DATA[:500])
    data = file.read_bytes()
    hashes = hash_file(file, ["md5", "sha256", "gitsha1"], length)
    assert hashes.size == len(data)
    assert hashes.digest("sha256").value == hashlib.sha256(data).hexdigest()
    assert hashes.digest("md5").value == hashlib.md5(data).hexdigest()
    assert hashes.digest("gitsha1").value == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    assert hashes.pieces == pieces_of(data, length)


def test_an_empty_file_has_digests_and_no_pieces(file: Path) -> None:
    file.write_bytes(b"")
    hashes = hash_file(file, ["sha256"], 10)
    assert hashes.digest("sha256").value == hashlib.sha256().hexdigest()
    assert hashes.pieces.sha256 == ()


def test_progress_counts_up_to_the_size(file: Path) -> None:
    seen: list[int] = []
    hash_file(file, ["sha256"], 4096, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(DATA)


def test_bytes_that_are_missing_count_as_wrong(file: Path) -> None:
    file.write_bytes(DATA[:50_000])
    bad = find_bad_pieces(file, len(DATA), pieces_of(DATA, 10_000))
    assert bad[0] == Span(50_000, 60_000)
    assert len(bad) == 6


def test_more_pieces_than_one_window_are_all_checked(file: Path) -> None:
    wrong = bytearray(DATA)
    for offset in (0, 64_000, 64_999, 99_999):
        wrong[offset] ^= 1
    file.write_bytes(wrong)
    done: list[int] = []
    bad = find_bad_pieces(file, len(DATA), pieces_of(DATA, 500), done.append)
    assert [span.start for span in bad] == [0, 64_000, 64_500, 99_500]
    assert sum(done) == len(DATA)
