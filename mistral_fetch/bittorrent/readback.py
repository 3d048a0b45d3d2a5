"""Reading back from the files what libtorrent verified in memory, while the rest of the torrent still comes.

libtorrent calls a piece done before it is on the disk, and never looks at it again. So each piece is read back and
hashed once more: what matches there may be recorded and hashed onwards at once, instead of in two passes over the
finished files. A piece that does not match yet is tried again when all was flushed.

Knows paths and pieces, not partials; the spans it proves are handed on.
"""

from __future__ import annotations

import enum
import hashlib
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.bittorrent.metainfo import Metainfo, TorrentFile
from mistral_fetch.spans import Span
from mistral_fetch.units import MIB

READ_BYTES = MIB
# Pieces wait until so much has passed after them: twice what libtorrent may hold unwritten, see its settings.
LAG_BYTES = 16 * MIB


class Proof(enum.Enum):
    """What reading back came to."""

    COMPLETE = enum.auto()
    """Every wanted piece was right on the disk."""
    PARTIAL = enum.auto()
    """Nothing was wrong, but some pieces could not be looked at: they reach into files that are not wanted."""
    CHANGED = enum.auto()
    """A file is not what was written to it: a piece is wrong, or another program replaced or shortened it."""


class ReadBack:
    """Proves pieces of the wanted files in a thread of its own; a context manager around the transfer.

    Args:
        metainfo: The torrent; only one with v1 pieces can be proved piece by piece.
        data_paths: Where each wanted file is, by index.
        on_proved: Called from the thread with a file's index and a span of it that is right on the disk. What it
            raises is raised by :meth:`finish`.
    """

    def __init__(
        self, metainfo: Metainfo, data_paths: Mapping[int, Path], on_proved: Callable[[int, Span], None]
    ) -> None:
        self._metainfo = metainfo
        self._paths = dict(data_paths)
        self._on_proved = on_proved
        self._files = [file for file in metainfo.files if file.size]
        self._offsets = [file.offset for file in self._files]
        self._waiting: deque[int] = deque()
        self._failed: list[int] = []
        self._proved: set[int] = set()
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._state = threading.Condition()
        self._is_flushed = False
        self._is_over = False
        self._error: BaseException | None = None
        self._identities: dict[int, tuple[int, int]] = {}
        self._lag = max(2, -(-LAG_BYTES // metainfo.piece_length))
        self._thread = threading.Thread(target=self._run, name="read-back", daemon=True)

    def begin(self) -> None:
        """Start; the files are there by now."""
        self._identities = {index: self._identity(index) for index in self._paths}
        self._thread.start()

    def piece_passed(self, piece: int) -> None:
        """Queue a piece that matched in memory."""
        if self._metainfo.v1_pieces:
            with self._state:
                self._waiting.append(piece)
                self._state.notify_all()

    def finish(self, wait: Callable[[], None]) -> Proof:
        """Prove the rest, once everything was flushed; ``wait`` is called meanwhile and may raise.

        Raises:
            OSError: A file cannot be read.
        """
        with self._state:
            self._waiting.extend(self._failed)
            self._failed.clear()
            self._is_flushed = True
            self._state.notify_all()
            while self._waiting and self._error is None:
                wait()
                self._state.wait(0.1)
        self.close()
        if self._error is not None:
            raise self._error
        return self._judge()

    def close(self) -> None:
        """End the thread."""
        with self._state:
            self._is_over = True
            self._state.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _judge(self) -> Proof:
        if self._failed or any(self._has_changed(index) for index in self._paths):
            return Proof.CHANGED
        wanted = {piece for file in self._files if file.index in self._paths for piece in self._pieces_of(file)}
        return Proof.COMPLETE if wanted <= self._proved else Proof.PARTIAL

    def _pieces_of(self, file: TorrentFile) -> range:
        length = self._metainfo.piece_length
        return range(file.offset // length, (file.offset + file.size - 1) // length + 1)

    def _run(self) -> None:
        try:
            while (piece := self._next()) is not None:
                self._look_at(piece)
                with self._state:
                    self._waiting.popleft()
                    self._state.notify_all()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            with self._state:
                self._error = error
                self._state.notify_all()

    def _next(self) -> int | None:
        """Return the piece to look at, left in the queue until that is done; None at the end."""
        with self._state:
            while not self._is_over and len(self._waiting) <= (0 if self._is_flushed else self._lag):
                self._state.wait()
            return None if self._is_over else self._waiting[0]

    def _look_at(self, piece: int) -> None:
        start = piece * self._metainfo.piece_length
        end = min(start + self._metainfo.piece_length, self._metainfo.total_length)
        parts = self._parts(start, end)
        if piece in self._proved or not all(file.index in self._paths for file, _ in parts):
            return
        if self._hash(parts, start, end) != self._metainfo.v1_pieces[20 * piece : 20 * piece + 20]:
            with self._state:
                self._failed.append(piece)
            return
        self._proved.add(piece)
        for file, span in parts:
            self._on_proved(file.index, span)

    def _parts(self, start: int, end: int) -> list[tuple[TorrentFile, Span]]:
        """Return the files with bytes between two places of the torrent, and which of their bytes these are."""
        parts = []
        at = max(bisect_right(self._offsets, start) - 1, 0)
        while at < len(self._files) and self._files[at].offset < end:
            file = self._files[at]
            first, last = max(start, file.offset), min(end, file.offset + file.size)
            if first < last:
                parts.append((file, Span(first - file.offset, last - file.offset)))
            at += 1
        return parts

    def _hash(self, parts: list[tuple[TorrentFile, Span]], start: int, end: int) -> bytes:
        hasher = hashlib.sha1(usedforsecurity=False)
        position = start
        for file, span in parts:
            hasher.update(bytes(file.offset + span.start - position))  # padding, which is zeros
            self._update(hasher, self._paths[file.index], span)
            position = file.offset + span.end
        hasher.update(bytes(end - position))
        return hasher.digest()

    def _update(self, hasher: hashlib._Hash, path: Path, span: Span) -> None:
        try:
            descriptor = os.open(path, system.READ)
        except FileNotFoundError:
            return  # another program took it away: the hash is then a wrong one
        try:
            position = span.start
            while position < span.end:
                view = self._buffer[: min(READ_BYTES, span.end - position)]
                length = system.read_into(descriptor, view, position)
                if length == 0:
                    break
                hasher.update(view[:length])
                position += length
        finally:
            os.close(descriptor)

    def _identity(self, index: int) -> tuple[int, int]:
        status = self._paths[index].stat()
        return status.st_dev, status.st_ino

    def _has_changed(self, index: int) -> bool:
        """Return whether a file was replaced, or cut short and filled up again behind what was looked at."""
        size = next(file.size for file in self._metainfo.files if file.index == index)
        try:
            return self._identity(index) != self._identities[index] or _first_hole(self._paths[index]) != size
        except FileNotFoundError:
            return True


def _first_hole(path: Path) -> int:
    """Return up to where a file has data; its size where the file system does not tell."""
    descriptor = os.open(path, system.READ)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0 or not hasattr(os, "SEEK_HOLE"):
            return size
        return os.lseek(descriptor, 0, os.SEEK_HOLE)
    finally:
        os.close(descriptor)
