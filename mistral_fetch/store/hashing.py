"""Reading a file once for every digest wanted of it, on as many cores as that can use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.digest import Digest, new_hash
from mistral_fetch.manifest import PieceHashes
from mistral_fetch.spans import PieceGrid, Span
from mistral_fetch.units import MIB

READ_BYTES = 4 * MIB


@dataclass(frozen=True)
class FileHashes:
    """What one pass over a file found."""

    size: int
    digests: tuple[Digest, ...]
    pieces: PieceHashes

    def digest(self, algorithm: str) -> Digest:
        """Return one of the digests that were asked for."""
        return next(digest for digest in self.digests if digest.algorithm == algorithm)


def hash_file(
    path: Path,
    algorithms: Collection[str],
    piece_length: int,
    advance: Callable[[int], None] | None = None,
) -> FileHashes:
    """Return whole-file digests and piece sha256s of a file, read once in order.

    The digests are computed side by side, one thread each: hashlib releases the interpreter lock.

    Args:
        path: The file.
        algorithms: Whole-file digests wanted.
        piece_length: The grid of the piece hashes, in bytes.
        advance: Called with the number of bytes done so far; may raise to stop.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(len(algorithms) + 1) as pool:
        size = os.fstat(file.fileno()).st_size
        hashers = {algorithm: new_hash(algorithm, size) for algorithm in algorithms}
        pieces = _PieceHasher(piece_length)
        buffers = [bytearray(READ_BYTES), bytearray(READ_BYTES)]
        running: list[Future[None]] = []
        done = 0
        while length := file.readinto(buffers[0]):
            for future in running:  # the buffer about to be read into next must be free again
                future.result()
            chunk = memoryview(buffers[0])[:length]
            running = [pool.submit(hasher.update, chunk) for hasher in hashers.values()]
            running.append(pool.submit(pieces.update, chunk))
            buffers.reverse()
            done += length
            if advance is not None:
                advance(done)
        for future in running:
            future.result()
    digests = tuple(Digest(algorithm, hasher.hexdigest()) for algorithm, hasher in hashers.items())
    return FileHashes(done, digests, PieceHashes(piece_length, pieces.finish()))


class _PieceHasher:
    """Cuts a stream of chunks at the piece borders and hashes each piece."""

    def __init__(self, piece_length: int) -> None:
        self._piece_length = piece_length
        self._done: list[str] = []
        self._current = hashlib.sha256()
        self._filled = 0

    def update(self, chunk: memoryview) -> None:
        while chunk:
            take = min(len(chunk), self._piece_length - self._filled)
            self._current.update(chunk[:take])
            self._filled += take
            chunk = chunk[take:]
            if self._filled == self._piece_length:
                self._end_piece()

    def finish(self) -> tuple[str, ...]:
        if self._filled:
            self._end_piece()
        return tuple(self._done)

    def _end_piece(self) -> None:
        self._done.append(self._current.hexdigest())
        self._current, self._filled = hashlib.sha256(), 0


def find_bad_pieces(
    path: Path,
    size: int,
    pieces: PieceHashes,
    advance: Callable[[int], None] | None = None,
) -> list[Span]:
    """Return the spans of the pieces whose bytes differ, hashing on every usable core.

    Args:
        path: The file; bytes it lacks count as wrong.
        size: The size it should have.
        pieces: The piece hashes it should have.
        advance: Called with the bytes checked since the last call.

    Raises:
        OSError: The file cannot be read.
    """
    grid = PieceGrid(size, pieces.length)
    bad: list[Span] = []
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(system.usable_cores()) as pool:
        descriptor = file.fileno()

        def check(index: int) -> bool:
            return _hash_span(descriptor, grid.span(index)) == pieces.sha256[index]

        # A bounded window keeps the queue of futures small for a file of many thousand pieces.
        for window in _windows(range(grid.count), 64):
            for index, is_good in zip(window, pool.map(check, window), strict=True):
                if not is_good:
                    bad.append(grid.span(index))
                if advance is not None:
                    advance(grid.span(index).length)
    return bad


def hash_pieces(path: Path, spans: Sequence[Span]) -> list[str]:
    """Return the sha256 of each span of a file, on every usable core.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(system.usable_cores()) as pool:
        descriptor = file.fileno()
        return list(pool.map(lambda span: _hash_span(descriptor, span), spans))


def _hash_span(descriptor: int, span: Span) -> str:
    hasher = hashlib.sha256()
    position = span.start
    while position < span.end:
        chunk = system.read_at(descriptor, min(MIB, span.end - position), position)
        if not chunk:
            break
        hasher.update(chunk)
        position += len(chunk)
    return hasher.hexdigest()


def _windows(indices: range, length: int) -> Iterable[range]:
    return (indices[start : start + length] for start in range(0, len(indices), length))
