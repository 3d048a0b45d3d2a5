"""Hashing whole files while they are still being filled, so that a digest costs only the tail of the transfer.

One thread walks behind the pieces: as far as a file is there without a gap, it is read back from the file and hashed.
Pieces that an earlier process recorded are proved again on the way. Knows nothing of where bytes come from; what
somebody writes behind our back (the swarm's engine) moves the gap when it is recorded, else it is hashed afterwards.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any

from mistral_fetch import system
from mistral_fetch.digest import Digest, new_hash
from mistral_fetch.manifest import PieceHashes
from mistral_fetch.store.hashing import FileHashes, hash_pieces
from mistral_fetch.store.journal import UNHASHED
from mistral_fetch.store.partials import Partial
from mistral_fetch.units import MIB, smoothed

READ_BYTES = MIB
# Piece hashes that were left out are made up for at the end, unless that would be a second pass over the file.
MAKE_UP_SHARE = 0.25
_WAIT_SECONDS = 0.2
_SMOOTHING = 0.2


class _Progress:
    """How far one file is hashed."""

    def __init__(self, partial: Partial, algorithms: Collection[str]) -> None:
        self.partial = partial
        self.algorithms = sorted(algorithms)
        self.begin()

    def begin(self) -> None:
        self.generation = self.partial.generation
        self.position = 0
        self.hashers: dict[str, Any] = {name: new_hash(name, self.partial.grid.size) for name in self.algorithms}
        self.pieces: list[str] = []
        self.changed: list[int] = []
        self.partial.followed_end = 0

    @property
    def is_done(self) -> bool:
        return self.position == self.partial.grid.size

    def available(self) -> int:
        """Return up to where the next piece can be read, or the position itself."""
        if self.generation != self.partial.generation:
            self.begin()
        return self.partial.contiguous_end()


class PrefixFollower:
    """Follows several partials, in their order; a context manager around the transfer.

    Args:
        partials: What is about to be filled, each with the digests wanted of it (sha256 is always among them).
    """

    def __init__(self, partials: Sequence[tuple[Partial, Collection[str]]]) -> None:
        self._files = [_Progress(partial, {"sha256", *algorithms}) for partial, algorithms in partials]
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._state = threading.Condition()
        self._is_over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefix-hasher", daemon=True)

    def __enter__(self) -> PrefixFollower:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._thread.join()
        for file in self._files:
            file.partial.followed_end = None

    def finish(self, partial: Partial, advance: Callable[[int], None]) -> FileHashes | None:
        """Return a complete partial's hashes, waiting for the tail; None if it was not filled piece by piece.

        Args:
            partial: One of those followed. Nobody fills it any more.
            advance: Called with the bytes hashed so far while there is something to wait for; may raise to stop.

        Raises:
            OSError: The file cannot be read.
        """
        file = next((file for file in self._files if file.partial is partial), None)
        if file is None or partial.missing_pieces():
            return None
        with self._state:
            while not self._is_hashed(file):
                if self._error is not None:
                    raise self._error
                advance(file.position)
                self._state.wait(_WAIT_SECONDS)
        pieces = self._pieces(file)
        digests = tuple(Digest(name, hasher.hexdigest()) for name, hasher in file.hashers.items())
        return None if file.changed else FileHashes(partial.grid.size, digests, pieces)

    @staticmethod
    def _pieces(file: _Progress) -> PieceHashes:
        """Return the piece hashes, or none where too many were left out."""
        left_out = [index for index, sha256 in enumerate(file.pieces) if sha256 == UNHASHED]
        if len(left_out) > MAKE_UP_SHARE * len(file.pieces):
            return PieceHashes(0, ())
        if not left_out:
            return PieceHashes(file.partial.grid.piece_length, tuple(file.pieces))
        made_up = hash_pieces(file.partial.data_path, [file.partial.grid.span(index) for index in left_out])
        for index, sha256 in zip(left_out, made_up, strict=True):
            file.pieces[index] = sha256
        return PieceHashes(file.partial.grid.piece_length, tuple(file.pieces))

    @staticmethod
    def _is_hashed(file: _Progress) -> bool:
        return file.is_done and file.generation == file.partial.generation

    def _run(self) -> None:
        try:
            while not self._is_over:
                file = next((file for file in self._files if file.available() > file.position), None)
                if file is None:
                    self._wait()
                else:
                    self._follow(file)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            with self._state:
                self._error = error
                self._state.notify_all()

    def _wait(self) -> None:
        unfinished = next((file.partial for file in self._files if not file.is_done), None)
        if unfinished is None:
            self._is_over = self._is_over or not self._files
            with self._state:
                self._state.wait(_WAIT_SECONDS / 4)
            return
        with unfinished.changed:
            unfinished.changed.wait(_WAIT_SECONDS)

    def _follow(self, file: _Progress) -> None:
        """Hash whole pieces as long as there are any without a gap."""
        generation = file.generation
        try:
            descriptor = os.open(file.partial.data_path, system.READ)
        except FileNotFoundError:
            if file.generation == file.partial.generation:
                raise
            return  # discarded since it was looked at
        try:
            while not self._is_over and file.available() > file.position and file.generation == generation:
                self._hash_piece(file, descriptor)
        finally:
            os.close(descriptor)
        with self._state:
            self._state.notify_all()

    def _hash_piece(self, file: _Progress, descriptor: int) -> None:
        index = len(file.pieces)
        span = file.partial.grid.span(index)
        # A piece of this process was hashed before it was written; of an earlier one's only the record is at hand.
        proof = None if file.partial.was_put_here(index) else hashlib.sha256()
        position, began = span.start, time.monotonic()
        while position < span.end:
            view = self._buffer[: min(READ_BYTES, span.end - position)]
            length = system.read_into(descriptor, view, position)
            if length == 0:
                raise OSError(f"{file.partial.data_path} became shorter")
            for hasher in file.hashers.values():
                hasher.update(view[:length])
            if proof is not None:
                proof.update(view[:length])
            position += length
        recorded = file.partial.piece_sha256(index) or ""
        if proof is not None and recorded == UNHASHED:
            recorded = proof.hexdigest()
        elif proof is not None and proof.hexdigest() != recorded:
            file.changed.append(index)
        file.pieces.append(recorded)
        file.position = span.end
        with file.partial.changed:
            file.partial.followed_end = span.end
            rate, known = span.length / max(time.monotonic() - began, 1e-6), file.partial.followed_bytes_per_second
            file.partial.followed_bytes_per_second = smoothed(known, rate, _SMOOTHING)
            file.partial.changed.notify_all()
