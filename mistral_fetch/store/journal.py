"""The record of which pieces of a partial are durable: one append-only file per process.

A line is written only after the piece's bytes were synced. Layout::

    mistral-fetch-journal 1 size=<bytes> piece=<bytes> boot=<boot id or ->
    <piece index> <sha256 of the piece, or -> <crc32 of the two fields before, 8 hex digits>

Reading stops at the first line that is cut short or whose crc32 is wrong: after a crash only the tail can be torn.
"""

from __future__ import annotations

import os
import re
import secrets
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.spans import PieceGrid
from mistral_fetch.store.crash_points import reached
from mistral_fetch.store.durable import boot_id, fsync_directory

# In the place of a piece's sha256: durable, but not hashed, so it counts only as long as this boot lasts.
UNHASHED = "-"

_HEADER = re.compile(r"mistral-fetch-journal 1 size=(\d{1,20}) piece=(\d{1,20}) boot=(\S+)")
_RECORD = re.compile(r"(\d{1,10}) ([0-9a-f]{64}|-) ([0-9a-f]{8})")
_NAME = re.compile(r"journal-(\d{1,10})-[0-9a-f]{8}\.log")
MAX_HEADER_CHARACTERS = 256
# Longer than any writer goes without recording a batch.
LIVING_SECONDS = 600.0
FOREIGN_SECONDS = 60.0
MAX_JOURNAL_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class JournalRecords:
    """What one journal says: sha256 by piece index, and whether this boot of the host wrote it."""

    pieces: dict[int, str]
    is_of_this_boot: bool


def read_journal(path: Path, grid: PieceGrid) -> JournalRecords | None:
    """Return the records of a journal, or None if it belongs to another file or grid, or is gone."""
    try:
        if path.stat().st_size > MAX_JOURNAL_BYTES:
            return None
        text = path.read_bytes()
    except FileNotFoundError:
        return None  # another process discarded the download since the directory was listed
    lines = text.decode("ascii", "replace").split("\n")
    header = _HEADER.fullmatch(lines[0])
    if header is None or (int(header[1]), int(header[2])) != (grid.size, grid.piece_length):
        return None
    pieces: dict[int, str] = {}
    for line in lines[1:-1]:  # what follows the last newline is empty or torn
        record = _RECORD.fullmatch(line)
        if record is None or int(record[3], 16) != _crc(f"{record[1]} {record[2]}"):
            break
        if int(record[1]) < grid.count:
            pieces[int(record[1])] = record[2]
    here = boot_id()
    return JournalRecords(pieces, is_of_this_boot=bool(here) and header[3] == here)


def journal_paths(directory: Path) -> list[Path]:
    """Return the journals in a partial's directory, in a fixed order."""
    return sorted(directory.glob("journal-*.log"))


def living_writers(directory: Path) -> list[Path]:
    """Return the journals of other processes that may still be writing.

    A process of this boot lives if its number does, and its journal is not older than any transfer goes without a
    batch. One of another boot is of another host, or of a host that went down: it counts as living for a minute.
    """
    found = []
    for path in journal_paths(directory):
        match = _NAME.fullmatch(path.name)
        try:
            with path.open(encoding="ascii", errors="replace") as file:
                header = _HEADER.fullmatch(file.readline(MAX_HEADER_CHARACTERS).rstrip("\n"))
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue
        if match is None or header is None or int(match[1]) == os.getpid():
            continue
        is_local = header[3] == boot_id()
        if age < (LIVING_SECONDS if is_local and is_alive(match[1]) else 0 if is_local else FOREIGN_SECONDS):
            found.append(path)
    return found


def is_alive(process: str) -> bool:
    """Return whether a process of this number runs on this machine."""
    try:
        return system.is_alive(int(process))
    except ValueError:
        return False


class JournalWriter:
    """Appends records; ``append`` returns once they are durable. A journal that got no record is removed again."""

    def __init__(self, directory: Path, grid: PieceGrid) -> None:
        self.path = directory / f"journal-{os.getpid()}-{secrets.token_hex(4)}.log"
        self._is_empty = True
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | system.BINARY, 0o644)
        header = f"mistral-fetch-journal 1 size={grid.size} piece={grid.piece_length} boot={boot_id() or '-'}\n"
        try:
            self._write(header)
            system.sync_file(self._descriptor)
            fsync_directory(directory)
        except OSError:
            os.close(self._descriptor)
            self.path.unlink(missing_ok=True)
            raise

    def append(self, pieces: dict[int, str]) -> None:
        """Record pieces whose bytes are durable already."""
        lines = []
        for index, sha256 in sorted(pieces.items()):
            fields = f"{index} {sha256}"
            lines.append(f"{fields} {_crc(fields):08x}\n")
        self._is_empty = False
        self._write("".join(lines))
        reached("journal-appended")
        system.sync_file(self._descriptor)
        reached("journal-synced")

    def close(self) -> None:
        """Close the file; it stays for the next process to read."""
        os.close(self._descriptor)
        if self._is_empty:
            self.path.unlink(missing_ok=True)

    def _write(self, text: str) -> None:
        length = os.fstat(self._descriptor).st_size
        data = text.encode("ascii")
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            # A full disk cuts a line short, and reading stops there: without this, all later lines are lost.
            with suppress(OSError):
                os.ftruncate(self._descriptor, length)
            raise


def _crc(fields: str) -> int:
    return zlib.crc32(fields.encode("ascii"))
