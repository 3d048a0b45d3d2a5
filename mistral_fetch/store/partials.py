"""Unfinished files: the data, and the record of which pieces of it are good.

A partial is a directory: ``data`` (full size from the start, sparse), ``journal-*.log`` (one per process,
see :mod:`mistral_fetch.store.journal`), ``validator`` (what the server called this version of the file),
``about.json`` and ``lock`` (see below) and, once the blob exists, ``committed.json``. Sources write through
:meth:`Partial.put`; a source with its own engine (the swarm) writes ``data_path`` itself, proves its pieces
in its own way and has them recorded with :meth:`Partial.record_written`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.errors import PieceMismatch
from mistral_fetch.manifest import DEFAULT_PIECE_LENGTH, PieceHashes
from mistral_fetch.spans import PieceGrid, Span, merge
from mistral_fetch.store.crash_points import reached
from mistral_fetch.store.durable import disk_errors, fsync_directory, has_blocks, make_directory, write_durably
from mistral_fetch.store.journal import UNHASHED, JournalWriter, is_alive, journal_paths, living_writers, read_journal
from mistral_fetch.store.partial_notes import ABOUT_NAME, LOCK_NAME, CommittedBlob
from mistral_fetch.units import KIB, MIB

# One batch: what a kill -9 may cost. Large enough that fdatasync does not stall the wire.
BATCH_BYTES = 64 * MIB

# With the whole-file hash further behind than this, the processor is what is short.
SKIP_LAG_BYTES = 64 * MIB

_READ_BYTES = 256 * KIB

# Foreign piece grids outside these bounds are not used for writing: tiny pieces cost a journal line each.
MIN_PIECE_LENGTH = 64 * KIB
MAX_PIECE_LENGTH = 64 * MIB


class Partial:
    """One unfinished file on a grid of pieces. Any number of threads may put pieces into it.

    Where piece hashes are known, any number of processes may share the data file: whatever they write was verified,
    so writing it twice changes nothing. Without them a second writer's bytes would be checked by nobody, so a process
    that finds another one at work (their lock did not hold it off) works in a data file of its own.

    Args:
        directory: The partial's own directory; created when the first byte is written.
        size: The file's size in bytes.
        pieces: The manifest's piece hashes, if any; then no wrong piece is ever written.
        needs_piece_hashes: Hash every piece even if whoever hashes the whole file cannot keep up. Where the manifest
            has a strong digest of the whole, our own piece hashes are a convenience that must not slow a fast line.
    """

    def __init__(
        self, directory: Path, size: int, pieces: PieceHashes | None = None, *, needs_piece_hashes: bool = True
    ) -> None:
        usable = pieces is not None and MIN_PIECE_LENGTH <= pieces.length <= MAX_PIECE_LENGTH
        self.directory = directory
        self.known_pieces = pieces if usable else None
        self.grid = PieceGrid(size, pieces.length if usable and pieces else DEFAULT_PIECE_LENGTH)
        self._needs_piece_hashes = needs_piece_hashes or self.known_pieces is not None
        self.followed_end: int | None = None
        """Up to which byte the whole file was hashed so far; None while nobody does that."""
        self.followed_bytes_per_second = 0.0
        """How fast that goes while there is something to hash."""
        self.generation = 0
        """Grows whenever bytes that counted as present stop counting."""
        self.changed = threading.Condition(threading.RLock())
        """Held while the record of what is present changes; notified afterwards."""
        self._write_lock = threading.Lock()
        self._flush_lock = threading.RLock()
        self._recorded: dict[int, str] = {}
        self._unflushed: dict[int, str] = {}
        self._unflushed_bytes = 0
        self._being_written: set[int] = set()
        self._opening = 0
        """Which opening of the data file is in use: what was written through an earlier one does not count."""
        self._put_here: dict[int, str] = {}
        self._rehashed: dict[int, str] = {}
        self._frontier = 0
        self._descriptor: int | None = None
        self._journal: JournalWriter | None = None
        self._private_name = ""
        self._load()

    @property
    def data_path(self) -> Path:
        """Return where the bytes are; the file has its full size as soon as it exists."""
        return self.directory / (self._private_name or "data")

    @property
    def present(self) -> list[Span]:
        """Return the spans whose pieces are written and hashed, flushed or not."""
        with self.changed:
            return merge(self.grid.span(index) for index in (*self._recorded, *self._unflushed))

    @property
    def present_bytes(self) -> int:
        """Return how many bytes :attr:`present` covers."""
        with self.changed:
            # A piece is in one of the two, so their lengths add up.
            count = len(self._recorded) + len(self._unflushed)
            last = self.grid.count - 1
            shortfall = self.grid.count * self.grid.piece_length - self.grid.size
            return count * self.grid.piece_length - (shortfall if self.piece_sha256(last) else 0)

    @property
    def unflushed_bytes(self) -> int:
        """Return how many bytes a kill would cost now."""
        return self._unflushed_bytes

    @property
    def has_bytes(self) -> bool:
        """Return whether anything lies on the disk, also what a source with its own engine wrote."""
        return has_blocks(self.data_path)

    def missing_pieces(self) -> list[int]:
        """Return the indices still to fetch, in order."""
        with self.changed:
            return [i for i in range(self.grid.count) if i not in self._recorded and i not in self._unflushed]

    def has_piece(self, index: int) -> bool:
        """Return whether a piece is present."""
        return index in self._unflushed or index in self._recorded

    def was_put_here(self, index: int) -> bool:
        """Return whether this process wrote a piece, so that its hash is of bytes it had in hand."""
        return index in self._put_here

    def senders(self) -> dict[int, tuple[str, str]]:
        """Return, by piece, who sent what this process wrote, and its sha256."""
        with self.changed:
            return {index: (source, self.piece_sha256(index) or "") for index, source in self._put_here.items()}

    def present_senders(self) -> dict[int, str]:
        """Return, by present piece, who sent it; '' where it lay here before."""
        with self.changed:
            return {index: self._put_here.get(index, "") for index in (*self._recorded, *self._unflushed)}

    def piece_sha256(self, index: int) -> str | None:
        """Return the sha256 of a present piece, ``UNHASHED`` where that was left for later."""
        return self._unflushed.get(index) or self._recorded.get(index)

    def lag_bytes(self) -> int:
        """Return how far whoever hashes the whole file is behind what is there without a gap."""
        return 0 if self.followed_end is None else max(0, self.contiguous_end() - self.followed_end)

    def contiguous_end(self) -> int:
        """Return up to which byte nothing is missing."""
        with self.changed:
            while self._frontier < self.grid.count and self.has_piece(self._frontier):
                self._frontier += 1
            return min(self._frontier * self.grid.piece_length, self.grid.size)

    def put(self, index: int, data: bytes | bytearray | memoryview, source: str) -> bool:
        """Verify one whole piece (when its hash is known), write it at its own offset, record it in time.

        Returns:
            Whether it was missing; a piece that is here, or is being written by another thread, is left alone.

        Raises:
            PieceMismatch: ``source`` sent wrong bytes; nothing was written.
            OutOfSpace, StoreNotWritable, StoreError: The disk refused.
            ValueError: ``data`` has not the piece's length.
        """
        span = self.grid.span(index)
        if len(data) != span.length:
            raise ValueError(f"piece {index} has {span.length} bytes, not {len(data)}")
        may_skip = not self._needs_piece_hashes and self.lag_bytes() > SKIP_LAG_BYTES
        sha256 = UNHASHED if may_skip else hashlib.sha256(data).hexdigest()
        if self.known_pieces is not None and sha256 != self.known_pieces.sha256[index]:
            raise PieceMismatch(
                f"piece {index} at bytes {span} from {source} is wrong",
                detail=f"expected sha256:{self.known_pieces.sha256[index]}, got sha256:{sha256}",
                hint="another source is tried; if this was the only one, report it to its operator",
            )
        reached("piece-verified")
        with disk_errors("writing a download", self.data_path):
            self._open()
            if not self._claim(index):
                return False
            try:
                opening = self._write(span.start, data)
            except BaseException:
                self._being_written.discard(index)
                raise
        reached("piece-written")
        if self._count(index, sha256, span.length, source, opening) >= BATCH_BYTES:
            self.flush()
        return True

    def record_written(self, index: int, source: str) -> bool:
        """Record a piece that somebody else wrote to the data file and read back from there.

        Returns:
            Whether it may stand: where its hash is known, it must match.

        Raises:
            StoreError: The disk refused.
        """
        may_skip = not self._needs_piece_hashes and self.lag_bytes() > SKIP_LAG_BYTES
        sha256 = UNHASHED if may_skip else self._hash_on_disk(index)
        if self.known_pieces is not None and sha256 != self.known_pieces.sha256[index]:
            return False
        with disk_errors("writing a download", self.data_path):
            self._open()
        if not self._claim(index):
            return True
        if self._count(index, sha256, self.grid.span(index).length, source, self._opening) >= BATCH_BYTES:
            self.flush()
        return True

    def _claim(self, index: int) -> bool:
        with self.changed:
            if self.has_piece(index) or index in self._being_written:
                return False
            self._being_written.add(index)
            return True

    def _count(self, index: int, sha256: str, length: int, source: str, opening: int) -> int:
        with self.changed:
            self._being_written.discard(index)
            if opening != self._opening:
                return 0  # it went into a file that was discarded, or through a sync that failed: it is missing
            self._unflushed[index] = sha256
            self._put_here[index] = source
            self._unflushed_bytes += length
            self.changed.notify_all()
            return self._unflushed_bytes

    def flush(self) -> None:
        """Make everything written durable, then record it (integrity rule 2). Writing may go on meanwhile.

        Raises:
            StoreError: The disk refused.
        """
        with disk_errors("syncing a download", self.data_path), self._flush_lock:
            self._flush()

    def close(self) -> None:
        """Flush and close; the partial stays for a later process."""
        try:
            self.flush()
        finally:
            self.close_without_recording()

    def close_without_recording(self) -> None:
        """Close the files and forget what was not flushed, as after a disk error."""
        # Nobody is writing: a number that the system gives to another file at once must not be written to.
        with self._flush_lock, self._write_lock, self.changed:
            self._forget_unflushed()
            self._close_journal()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def prepare(self) -> None:
        """Create the directory and the full-size data file, for a source that writes by itself.

        Raises:
            StoreError: The disk refused.
        """
        with disk_errors("starting a download", self.directory):
            self._open()

    def reset(self) -> None:
        """Forget all bytes: they turned out wrong, or belong to another version of the file."""
        self.close_without_recording()
        with self.changed:
            self._forget_recorded()
        with disk_errors("discarding a download", self.directory):
            if self.directory.is_dir():
                # Records first: a crash in between must never leave records without their bytes, or without the
                # name of the version they belong to.
                self._remove_journals()
                for path in self.directory.iterdir():
                    if path.name not in {ABOUT_NAME, LOCK_NAME}:
                        path.unlink(missing_ok=True)
                fsync_directory(self.directory)

    def recheck(self) -> list[Span]:
        """Re-hash every recorded piece on disk, forget those that changed and return where they were."""
        self.flush()
        hashed = sorted((index, sha256) for index, sha256 in self._recorded.items() if sha256 != UNHASHED)
        bad = [index for index, sha256 in hashed if self._hash_on_disk(index) != sha256]
        if bad:
            kept = {index: sha256 for index, sha256 in self._recorded.items() if index not in set(bad)}
            self._replace_journals(kept)
        return merge(self.grid.span(index) for index in bad)

    def keep_only(self, indices: Iterable[int]) -> None:
        """Forget all pieces but these; the bytes of the others stay on disk and mean nothing."""
        self.flush()
        kept = {index: self._recorded[index] for index in indices if index in self._recorded}
        sources = {index: source for index, source in self._put_here.items() if index in kept}
        self._replace_journals(kept)
        self._put_here = sources

    @property
    def validator(self) -> str:
        """Return what the server called this version (a strong ETag or a date), or ''."""
        try:
            return (self.directory / "validator").read_text("utf-8")
        except FileNotFoundError:
            return ""

    def set_validator(self, validator: str) -> None:
        """Remember the version the bytes belong to, before the first of them is written."""
        with disk_errors("starting a download", self.directory):
            write_durably(self.directory / "validator", validator.encode())

    @property
    def committed(self) -> CommittedBlob | None:
        """Return which blob this partial became, if it did."""
        try:
            fields = json.loads((self.directory / "committed.json").read_bytes())
            pieces = PieceHashes(int(fields["piece_length"]), tuple(map(str, fields["pieces"])))
            return CommittedBlob(str(fields["sha256"]), int(fields["size"]), pieces)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # torn or foreign: the partial is then simply not committed

    def set_committed(self, blob: CommittedBlob) -> None:
        """Record, durably, which blob this partial is about to become."""
        fields = {
            "sha256": blob.sha256,
            "size": blob.size,
            "piece_length": blob.pieces.length,
            "pieces": list(blob.pieces.sha256),
        }
        write_durably(self.directory / "committed.json", json.dumps(fields).encode())

    def remove(self) -> None:
        """Delete the partial and its directory."""
        self.close_without_recording()
        if self._private_name and self.committed is None:
            self.data_path.unlink(missing_ok=True)
            return  # the rest is another process's, which is still at work
        with disk_errors("removing a finished download", self.directory):
            if self.directory.is_dir():
                shutil.rmtree(self.directory, ignore_errors=True)  # a process that lost the race may be writing in it
                if self.directory.is_dir():
                    shutil.rmtree(self.directory)
                fsync_directory(self.directory.parent)

    def _load(self) -> None:
        if not self.data_path.is_file() or self.data_path.stat().st_size != self.grid.size:
            return
        stale: dict[int, str] = {}
        for path in journal_paths(self.directory):
            records = read_journal(path, self.grid)
            if records is None:
                continue
            for index, sha256 in records.pieces.items():
                if self.known_pieces is not None and sha256 != self.known_pieces.sha256[index]:
                    continue
                (self._recorded if records.is_of_this_boot else stale)[index] = sha256
        # After a restart of the host, synced bytes should be there; should is not enough.
        for index, sha256 in stale.items():
            if index not in self._recorded and self._hash_on_disk(index) == sha256:
                self._rehashed[index] = sha256
        self._recorded.update(self._rehashed)

    def _remove_journals(self) -> None:
        for path in journal_paths(self.directory):
            path.unlink(missing_ok=True)  # another process may be discarding as well
        fsync_directory(self.directory)

    def _hash_on_disk(self, index: int) -> str:
        span = self.grid.span(index)
        try:
            with self.data_path.open("rb", buffering=0) as file:
                file.seek(span.start)
                hasher, left = hashlib.sha256(), span.length
                # A piece's worth of fresh memory for each piece would cost as much as hashing half of it.
                buffer = memoryview(bytearray(min(_READ_BYTES, span.length)))
                while left and (length := file.readinto(buffer[:left])):
                    hasher.update(buffer[:length])
                    left -= length
                return hasher.hexdigest()
        except OSError:
            return ""  # gone or unreadable (a bad sector): not present, so it is fetched and written again

    def _open(self) -> int:
        with self.changed:
            if self._descriptor is None:
                make_directory(self.directory)
                self._keep_off_others()
                self._descriptor = os.open(self.data_path, os.O_RDWR | os.O_CREAT | system.BINARY, 0o644)
                if os.fstat(self._descriptor).st_size != self.grid.size:
                    self._begin_anew(self._descriptor)
                fsync_directory(self.directory)
            return self._descriptor

    def _begin_anew(self, descriptor: int) -> None:
        # Records that an earlier data file left behind must not come to life with the new one.
        if not self._private_name:
            own = self._journal
            for path in journal_paths(self.directory):
                if own is None or path != own.path:
                    path.unlink(missing_ok=True)
            fsync_directory(self.directory)
        os.ftruncate(descriptor, self.grid.size)
        system.sync_file(descriptor)

    def _keep_off_others(self) -> None:
        """Take a data file of our own where another process writes bytes that no piece hash vouches for.

        Our journal is there before we look for others', so of two that begin at once at least one sees the other.
        """
        if self.known_pieces is not None or self._private_name:
            return
        if self._journal is None:
            self._journal = JournalWriter(self.directory, self.grid)
        if living_writers(self.directory):
            self._private_name = f"data-{os.getpid()}-{secrets.token_hex(4)}"
            self._close_journal()
            self._forget_recorded()
        else:
            for path in self.directory.glob("data-*-*"):
                if not is_alive(path.name.split("-")[1]):
                    path.unlink(missing_ok=True)  # of use to nobody

    def _write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data)
        # One writer at a time: Linux makes the writers of one file wait for each other anyway, and spin meanwhile.
        with self._write_lock:
            with self.changed:
                descriptor, opening = self._open(), self._opening
            while view:
                written = system.write_at(descriptor, view, offset)
                view, offset = view[written:], offset + written
        return opening

    def _flush(self) -> None:
        with self.changed:
            batch = dict(self._unflushed)
            if not batch:
                return
            descriptor = self._open()
        try:
            system.sync_file(descriptor, data_only=True)
        except OSError:
            # The system reports lost writes once and calls the pages clean afterwards: a later sync would
            # succeed and prove nothing.
            with self.changed:
                self._forget_unflushed()
            raise
        reached("data-synced")
        if not self._owns_data(descriptor):
            self._start_from_what_is_there()
            return
        self._record(batch)

    def _record(self, batch: dict[int, str]) -> None:
        if not self._private_name:  # else nobody will ever go on with it
            if self._journal is None:
                self._journal = JournalWriter(self.directory, self.grid)
            self._journal.append({**self._rehashed, **batch})
        with self.changed:
            self._recorded.update(batch)
            self._rehashed = {}
            for index in batch:
                if self._unflushed.pop(index, None) is not None:
                    self._unflushed_bytes -= self.grid.span(index).length

    def _start_from_what_is_there(self) -> None:
        """Another process discarded the download meanwhile: our bytes have no name any more."""
        self.close_without_recording()
        with self.changed:
            self._private_name = ""
            self._forget_recorded()
            self._load()

    def _owns_data(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.data_path.stat())
        except FileNotFoundError:
            return False

    def _forget_unflushed(self) -> None:
        self._opening += 1
        if self._unflushed:
            self._lose()
        self._unflushed = {}
        self._unflushed_bytes = 0

    def _forget_recorded(self) -> None:
        if self._recorded:
            self._lose()
        self._recorded = {}
        self._rehashed = {}

    def _lose(self) -> None:
        self.generation += 1
        self._frontier = 0
        self._put_here = {}
        self.changed.notify_all()

    def _close_journal(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()

    def _replace_journals(self, kept: dict[int, str]) -> None:
        with disk_errors("recording a repair", self.directory), self._flush_lock, self.changed:
            self._close_journal()
            self._forget_recorded()
            self._remove_journals()
            self._journal = JournalWriter(self.directory, self.grid)
            if kept:
                self._journal.append(kept)
            self._recorded = kept
