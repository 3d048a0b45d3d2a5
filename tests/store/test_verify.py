from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.digest import Digest
from mistral_fetch.errors import Interrupted
from mistral_fetch.events import BytesVerified, Event, ignore_events
from mistral_fetch.manifest import Manifest
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.spans import Span
from mistral_fetch.store.verify import FileVerdict, verify_directory

PIECE = 64 * 1024
FILES = {"a/w.bin": random.Random(2).randbytes(5 * PIECE + 10), "config.json": b"{}", "empty": b""}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for path, data in FILES.items():
        (tmp_path / "m" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / path).write_bytes(data)
    return tmp_path / "m"


def verify(directory: Path, manifest: Manifest | None = None) -> dict[str, FileVerdict]:
    manifest = manifest or PublisherSimulator(FILES).manifest()
    return {v.path: v for v in verify_directory(directory, manifest, ignore_events, lambda: None)}


def flip(path: Path, *offsets: int) -> None:
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 0x80
    path.write_bytes(data)


def test_a_right_directory_is_right(directory: Path) -> None:
    assert all(verdict.is_good for verdict in verify(directory).values())


@pytest.mark.parametrize("piece_length", [None, PIECE, 100_000])
def test_right_with_any_grid(directory: Path, piece_length: int | None) -> None:
    manifest = PublisherSimulator(FILES).manifest(piece_length=piece_length)
    assert all(verdict.is_good for verdict in verify(directory, manifest).values())


@pytest.mark.parametrize(
    "offset, piece", [(0, 0), (PIECE - 1, 0), (PIECE, 1), (5 * PIECE, 5), (len(FILES["a/w.bin"]) - 1, 5)]
)
def test_a_flipped_byte_is_named_by_its_piece(directory: Path, offset: int, piece: int) -> None:
    flip(directory / "a/w.bin", offset)
    verdict = verify(directory)["a/w.bin"]
    assert verdict.bad_spans == (Span(piece * PIECE, min((piece + 1) * PIECE, len(FILES["a/w.bin"]))),)
    assert "1 of 6 pieces" in verdict.problem
    assert str(verdict.bad_spans[0]) in verdict.problem


def test_every_bad_piece_is_counted(directory: Path) -> None:
    flip(directory / "a/w.bin", 1, 3 * PIECE, 3 * PIECE + 1, 5 * PIECE)
    assert [span.start // PIECE for span in verify(directory)["a/w.bin"].bad_spans] == [0, 3, 5]


def test_without_piece_hashes_the_digests_are_named(directory: Path) -> None:
    flip(directory / "a/w.bin", 7)
    verdict = verify(directory, PublisherSimulator(FILES).manifest(piece_length=None))["a/w.bin"]
    assert hashlib.sha256(FILES["a/w.bin"]).hexdigest() in verdict.problem
    assert hashlib.sha256((directory / "a/w.bin").read_bytes()).hexdigest() in verdict.problem


def test_a_weaker_digest_is_checked_where_it_is_all_there_is(directory: Path) -> None:
    entry = replace(
        PublisherSimulator(FILES).manifest().entry("config.json"),
        digests=(Digest("md5", hashlib.md5(b"{}").hexdigest()),),
        pieces=None,
    )
    assert verify(directory, Manifest((entry,)))["config.json"].is_good
    (directory / "config.json").write_bytes(b"[]")
    assert "md5:" in verify(directory, Manifest((entry,)))["config.json"].problem


@pytest.mark.parametrize("size", [len(FILES["a/w.bin"]) - 1, len(FILES["a/w.bin"]) + 1, 0])
def test_a_short_or_long_file_is_told_by_its_size(directory: Path, size: int) -> None:
    data = FILES["a/w.bin"] + b"x"
    (directory / "a/w.bin").write_bytes(data[:size])
    assert verify(directory)["a/w.bin"].problem == f"expected {len(FILES['a/w.bin'])} bytes, got {size}"


def test_a_missing_file_and_a_directory_in_its_place_are_told_apart(directory: Path) -> None:
    (directory / "a/w.bin").unlink()
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    verdicts = verify(directory)
    assert "No such file" in verdicts["a/w.bin"].problem
    assert "regular file" in verdicts["config.json"].problem
    assert verdicts["empty"].is_good


def test_a_dangling_link_is_a_missing_file(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to("nowhere")
    assert not verify(directory)["config.json"].is_good


def test_one_bad_file_does_not_hide_the_others(directory: Path) -> None:
    (directory / "config.json").write_bytes(b"[]")
    assert [path for path, verdict in verify(directory).items() if not verdict.is_good] == ["config.json"]


def test_progress_reaches_the_size(directory: Path) -> None:
    events: list[Event] = []
    verify_directory(directory, PublisherSimulator(FILES).manifest(), events.append, lambda: None)
    last = {event.path: event for event in events if isinstance(event, BytesVerified)}
    assert last["a/w.bin"].verified_bytes == last["a/w.bin"].total_bytes == len(FILES["a/w.bin"])


def test_a_stop_stops(directory: Path) -> None:
    stop = StopSignal()
    stop.set()
    with pytest.raises(Interrupted):
        verify_directory(directory, PublisherSimulator(FILES).manifest(), ignore_events, stop.check)
