from __future__ import annotations

import os
from pathlib import Path

import pytest

from mistral_fetch.spans import PieceGrid
from mistral_fetch.store import journal
from mistral_fetch.store.journal import JournalWriter, read_journal

GRID = PieceGrid(size=1000, piece_length=100)
A, B, C = "a" * 64, "b" * 64, "c" * 64


def written(directory: Path, pieces: dict[int, str]) -> Path:
    writer = JournalWriter(directory, GRID)
    writer.append(pieces)
    writer.close()
    return writer.path


def test_records_come_back(tmp_path: Path) -> None:
    records = read_journal(written(tmp_path, {0: A, 9: B}), GRID)
    assert records is not None
    assert records.pieces == {0: A, 9: B}
    assert records.is_of_this_boot


@pytest.mark.parametrize("kept_bytes", range(1, 77))
def test_a_torn_last_line_is_ignored_wherever_it_was_cut(tmp_path: Path, kept_bytes: int) -> None:
    path = written(tmp_path, {0: A, 1: B})
    data = path.read_bytes()
    last_line = data.rindex(b"1 " + B.encode())
    path.write_bytes(data[: last_line + min(kept_bytes, len(data) - last_line - 1)])
    records = read_journal(path, GRID)
    assert records is not None
    assert records.pieces == {0: A}


def test_reading_stops_at_a_wrong_crc(tmp_path: Path) -> None:
    path = written(tmp_path, {0: A, 1: B, 2: C})
    path.write_bytes(path.read_bytes().replace(b"1 bbbb", b"1 dbbb"))
    records = read_journal(path, GRID)
    assert records is not None
    assert records.pieces == {0: A}


@pytest.mark.parametrize("grid", [PieceGrid(1000, 200), PieceGrid(1001, 100), PieceGrid(100, 1000)])
def test_a_journal_of_another_grid_is_not_read(tmp_path: Path, grid: PieceGrid) -> None:
    assert read_journal(written(tmp_path, {0: A}), grid) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\xff\xfe\x00",
        b"mistral-fetch-journal 2 size=1000 piece=100 boot=x\n",
        b"mistral-fetch-journal 1 size=" + b"9" * 6000 + b" piece=100 boot=x\n",
        b"mistral-fetch-journal 1 size=1000 piece=100 boot=\n",
    ],
)
def test_something_that_is_no_journal_is_not_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal-1.log").write_bytes(content)
    assert read_journal(tmp_path / "journal-1.log", GRID) is None


def test_a_piece_beyond_the_file_is_ignored(tmp_path: Path) -> None:
    records = read_journal(written(tmp_path, {9: A, 10: B, 999: C}), GRID)
    assert records is not None
    assert records.pieces == {9: A}


def test_a_journal_that_vanished_is_no_journal(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "gone", GRID) is None


def test_another_boot_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {0: A})
    monkeypatch.setattr(journal, "boot_id", lambda: "another")
    records = read_journal(path, GRID)
    assert records is not None
    assert not records.is_of_this_boot


def test_a_system_without_boot_ids_never_claims_this_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "boot_id", lambda: "")
    records = read_journal(written(tmp_path, {0: A}), GRID)
    assert records is not None
    assert not records.is_of_this_boot


def test_a_line_cut_by_a_full_disk_does_not_hide_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JournalWriter(tmp_path, GRID)
    writer.append({0: A})
    write = os.write

    def short_then_full(descriptor: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", no_space)
        return write(descriptor, data[:10])

    def no_space(_descriptor: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", short_then_full)
    with pytest.raises(OSError, match="No space"):
        writer.append({1: B})
    monkeypatch.setattr(os, "write", write)
    writer.append({2: C})
    writer.close()
    records = read_journal(writer.path, GRID)
    assert records is not None
    assert records.pieces == {0: A, 2: C}


def test_two_processes_never_share_a_journal(tmp_path: Path) -> None:
    assert written(tmp_path, {}) != written(tmp_path, {})
