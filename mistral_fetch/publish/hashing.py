"""Every digest a publication needs, from reading each byte once.

Work is handed to threads in windows of 16 MiB (:mod:`hashlib` releases the interpreter lock): the running digests
of the file are one task each, since they cannot be split; the pieces are a task a 4 MiB unit. While a window is
hashed, the next one is read; so memory is two windows, whatever the files' sizes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.bittorrent import merkle
from mistral_fetch.bittorrent.create import HashedFile
from mistral_fetch.errors import PublishError
from mistral_fetch.manifest import DEFAULT_PIECE_LENGTH

UNIT_LENGTH = DEFAULT_PIECE_LENGTH
WINDOW_LENGTH = 4 * UNIT_LENGTH
# The file's own MD5 cannot be split; beside it, the other digests take less than three more cores.
MAX_HASHING_THREADS = 4
# Two blocks: with pieces of one, a peer can crash libtorrent 2.1.1 (see bittorrent/load.py).
MIN_TORRENT_PIECE_LENGTH = 2 * merkle.LEAF_LENGTH
TORRENT_PIECES_WANTED = 1024


@dataclass(frozen=True)
class SourceFile:
    """A file to publish: its name in the model, and where it lies."""

    path: str
    size: int
    location: Path = field(compare=False)


@dataclass(frozen=True)
class FileDigests:
    """What one pass over a file found; ``torrent`` is on the torrent's grid, ``pieces_sha256`` on 4 MiB."""

    path: str
    size: int
    sha256: str
    md5: str
    pieces_sha256: tuple[str, ...]
    torrent: HashedFile


@dataclass(frozen=True)
class HashedDirectory:
    """All files' digests, and the pieces of the plain v1 torrent in its own order of files."""

    files: tuple[FileDigests, ...]
    plain_order: tuple[tuple[str, int], ...]
    plain_pieces: tuple[bytes, ...]


def torrent_piece_length(total_size: int) -> int:
    """Return the largest piece length up to 4 MiB that still gives about 1024 pieces, at least 32 KiB.

    A peer can only pass on whole pieces, so a small model in a few large pieces would not spread.
    """
    length = UNIT_LENGTH
    while length > MIN_TORRENT_PIECE_LENGTH and length * TORRENT_PIECES_WANTED > total_size:
        length //= 2
    return length


def hash_files(
    files: Sequence[SourceFile], piece_length: int, last_in_tree: str, progress: Callable[[str, int], None]
) -> HashedDirectory:
    """Read every file once and return all digests.

    Args:
        files: What to read.
        piece_length: The torrents' grid, a power of two from 16 KiB to 4 MiB.
        last_in_tree: The path of the hybrid's last file: its last piece is not padded.
        progress: Called with a path and the bytes of it hashed so far.

    Raises:
        PublishError: A file cannot be read, or changed while it was read.
    """
    # Largest first: its pieces then begin on the grid, and the plain torrent shares them with the hybrid
    # instead of hashing 13 GB a second time.
    ordered = sorted(files, key=lambda file: (-file.size, file.path))
    plain = _PlainPieces(piece_length)
    digests = []
    with ThreadPoolExecutor(min(system.usable_cores(), MAX_HASHING_THREADS)) as pool:
        for file in ordered:
            pads = file.path != last_in_tree
            digests.append(_FilePass(file, piece_length, plain, pads).run(pool, progress))
    return HashedDirectory(
        files=tuple(digests),
        plain_order=tuple((file.path, file.size) for file in ordered),
        plain_pieces=plain.finish(),
    )


class _PlainPieces:
    """The pieces of the plain torrent, which run on from one file into the next."""

    def __init__(self, piece_length: int) -> None:
        self._piece_length = piece_length
        self._pieces: list[bytes] = []
        self._open = hashlib.sha1(usedforsecurity=False)
        self._filled = 0

    @property
    def is_on_grid(self) -> bool:
        """Return whether the next byte begins a piece."""
        return self._filled == 0

    def add_whole(self, pieces: Sequence[bytes]) -> None:
        """Take over whole pieces that were hashed elsewhere."""
        self._pieces += pieces

    def update(self, data: memoryview) -> None:
        """Feed bytes in order."""
        while data:
            taken = data[: self._piece_length - self._filled]
            self._open.update(taken)
            self._filled += len(taken)
            data = data[len(taken) :]
            if self._filled == self._piece_length:
                self._close()

    def finish(self) -> tuple[bytes, ...]:
        """Return all pieces, the last one as short as the bytes left it."""
        if self._filled:
            self._close()
        return tuple(self._pieces)

    def _close(self) -> None:
        self._pieces.append(self._open.digest())
        self._open = hashlib.sha1(usedforsecurity=False)
        self._filled = 0


@dataclass(frozen=True)
class _Unit:
    """What one task found in 4 MiB: the manifest's piece, and the torrents' pieces in it."""

    sha256: str
    v1: list[bytes]
    v2: list[bytes]


class _FilePass:
    """The one read of one file."""

    def __init__(self, file: SourceFile, piece_length: int, plain: _PlainPieces, pads_last: bool) -> None:
        self._file = file
        self._piece_length = piece_length
        self._plain = plain
        self._pads_last = pads_last
        self._shares_plain = plain.is_on_grid
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._units: list[_Unit] = []
        self._done = 0

    def run(self, pool: ThreadPoolExecutor, progress: Callable[[str, int], None]) -> FileDigests:
        pending: list[Future[None]] = []
        units: list[Future[_Unit]] = []
        length = 0
        try:
            for window in _windows(self._file):
                self._collect(pending, units, length, progress)
                pending, units, length = *self._submit(pool, window), len(window)
            self._collect(pending, units, length, progress)
        except OSError as error:
            raise _unreadable(self._file, error) from error
        finally:
            # After an error too: no task may go on with a buffer that is gone.
            wait(pending)
            wait(units)
        return self._result()

    def _submit(self, pool: ThreadPoolExecutor, window: memoryview) -> tuple[list[Future[None]], list[Future[_Unit]]]:
        # The slowest first, so that all threads end together.
        running = [pool.submit(self._md5.update, window), pool.submit(self._sha256.update, window)]
        if not self._shares_plain:
            running.append(pool.submit(self._plain.update, window))
        cuts = range(0, len(window), UNIT_LENGTH)
        return running, [pool.submit(self._hash_unit, window[cut : cut + UNIT_LENGTH]) for cut in cuts]

    def _collect(
        self,
        pending: list[Future[None]],
        units: list[Future[_Unit]],
        length: int,
        progress: Callable[[str, int], None],
    ) -> None:
        for running in pending:
            running.result()
        for future in units:
            self._units.append(future.result())
        if length:
            self._done += length
            progress(self._file.path, self._done)

    def _hash_unit(self, data: memoryview) -> _Unit:
        v1: list[bytes] = []
        v2: list[bytes] = []
        for start in range(0, len(data), self._piece_length):
            piece = data[start : start + self._piece_length]
            if len(piece) == self._piece_length:
                v1.append(hashlib.sha1(piece, usedforsecurity=False).digest())
            else:
                v1.append(self._last_v1_piece(piece))
            v2.append(self._v2_piece(piece))
        return _Unit(hashlib.sha256(data).hexdigest(), v1, v2)

    def _last_v1_piece(self, piece: memoryview) -> bytes:
        if self._shares_plain:
            self._plain.update(piece)  # only this task feeds it: all pieces before it are whole
        hasher = hashlib.sha1(piece, usedforsecurity=False)
        if self._pads_last:
            hasher.update(bytes(self._piece_length - len(piece)))
        return hasher.digest()

    def _v2_piece(self, piece: memoryview) -> bytes:
        digests = merkle.leaves(piece)
        # A file of at most one piece has no piece layer: its tree is only as wide as its leaves.
        width = self._piece_length // merkle.LEAF_LENGTH
        if self._file.size <= self._piece_length:
            width = merkle.next_power_of_two(len(digests))
        return merkle.root(digests, width)

    def _result(self) -> FileDigests:
        v1 = [piece for unit in self._units for piece in unit.v1]
        v2 = [piece for unit in self._units for piece in unit.v2]
        if self._shares_plain:
            self._plain.add_whole(v1[: self._file.size // self._piece_length])
        layer = tuple(v2) if len(v2) > 1 else ()
        only = v2[0] if v2 else b""
        root = merkle.file_root(layer, self._piece_length) if layer else only
        return FileDigests(
            path=self._file.path,
            size=self._file.size,
            sha256=self._sha256.hexdigest(),
            md5=self._md5.hexdigest(),
            pieces_sha256=tuple(unit.sha256 for unit in self._units),
            torrent=HashedFile(self._file.path, self._file.size, tuple(v1), root, layer),
        )


def _windows(file: SourceFile) -> Iterator[memoryview]:
    """Yield the file's bytes, 16 MiB at a time, from two buffers in turn.

    A yielded window is overwritten by the second read after it, so its hashing must have ended by then.

    Raises:
        PublishError: The file is not the one that was planned, or changed while it was read.
    """
    buffers = (
        bytearray(min(WINDOW_LENGTH, file.size)),
        bytearray(min(WINDOW_LENGTH, max(0, file.size - WINDOW_LENGTH))),
    )
    with file.location.open("rb", buffering=0) as stream:
        before = os.fstat(stream.fileno())
        _check_unchanged(file, before.st_size == file.size, "its size differs from a moment ago")
        position = turn = 0
        while position < file.size:
            window = memoryview(buffers[turn % 2])[: file.size - position]
            _check_unchanged(file, _read_fully(stream.readinto, window), "it became shorter")
            yield window
            position += len(window)
            turn += 1
        after = os.fstat(stream.fileno())
        same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        _check_unchanged(file, same, "its size or time of change differs after reading")
        replaced = (after.st_dev, after.st_ino) != _identity(file.location)
        _check_unchanged(file, not replaced, "another file took its name")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _read_fully(readinto: Callable[[memoryview], int | None], window: memoryview) -> bool:
    filled = 0
    while filled < len(window):
        count = readinto(window[filled:])
        if not count:
            return False
        filled += count
    return True


def _check_unchanged(file: SourceFile, is_unchanged: bool, reason: str) -> None:
    if not is_unchanged:
        raise PublishError(
            f"{file.path} changed while it was being published",
            detail=f"expected {file.size} bytes that stay as they are, but {reason}",
            hint="let whatever writes to the directory finish, then publish again",
        )


def _unreadable(file: SourceFile, error: OSError) -> PublishError:
    return PublishError(
        f"cannot read {file.path}",
        detail=f"expected a readable file, got: {error.strerror or error}",
        hint="check its permissions, then publish again",
    )
