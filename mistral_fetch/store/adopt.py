"""Bytes that are on this machine already become a blob without a download: shared, hashed, then named.

A candidate gets a second name in the partial's directory, in the cheapest way there is (reflink, hard link, copy);
what is hashed is that second name, and what was hashed is what becomes the blob. It is never called ``data``: that
file is written to, and a hard link is the user's own file.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.errors import IntegrityError
from mistral_fetch.events import BytesVerified, Notice, Report
from mistral_fetch.manifest import DEFAULT_PIECE_LENGTH, FileEntry
from mistral_fetch.store.blobs import compare
from mistral_fetch.store.durable import disk_errors, make_directory, rename_durably
from mistral_fetch.store.hashing import FileHashes, hash_file
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.partials import Partial
from mistral_fetch.units import MIB

ADOPTED_PREFIX = "adopted-"
HARD_LINK = "hard link"
_COPY_BYTES = 4 * MIB
_FICLONE = 0x40049409  # linux/fs.h: let the file behind one descriptor share all blocks of another's


def adopt_file(
    layout: Layout,
    entry: FileEntry,
    partial: Partial,
    candidate: Path,
    reserve_bytes: int,
    report: Report,
    check_stop: Callable[[], None],
) -> CommittedBlob | None:
    """Turn a file of this machine into a blob if it is what the manifest promises; say so if it is not.

    Args:
        layout: The cache.
        entry: What the file must be; it has a whole-file digest.
        partial: Where the file is shared into, and which notes the blob it became.
        candidate: The file; it stays where it is and is never written to.
        reserve_bytes: Free space that a copy must leave.
        report: Told how far hashing is, and what became of the candidate.
        check_stop: Called between reads; may raise.

    Raises:
        StoreError: The cache's disk refused.
        Interrupted: ``check_stop`` raised it.
    """
    with disk_errors("adopting a file", partial.directory):
        make_directory(partial.directory)
        for leftover in partial.directory.glob(f"{ADOPTED_PREFIX}*"):
            leftover.unlink(missing_ok=True)
    # A name of its own: where locks do not work, no other process renames what only it has hashed.
    shared = partial.directory / f"{ADOPTED_PREFIX}{secrets.token_hex(4)}"
    try:
        way = share_file(candidate, shared, entry.size or 0, reserve_bytes, check_stop)
        hashes = _hash_steady(shared, entry, partial, report, check_stop)
        compare(entry, hashes)
        blob = CommittedBlob(hashes.digest("sha256").value, hashes.size, hashes.pieces)
        _publish(layout, partial, shared, blob, is_ours=way != HARD_LINK)
    except (OSError, IntegrityError) as error:
        reason = error.detail if isinstance(error, IntegrityError) else error.strerror or str(error)
        report(Notice(f"{entry.path}: {candidate} is not adopted: {reason}"))
        return None
    finally:
        shared.unlink(missing_ok=True)  # gone already if it became the blob
    report(Notice(f"{entry.path}: adopted {candidate} ({way}), nothing to download"))
    return blob


def share_file(source: Path, target: Path, size: int, reserve_bytes: int, check_stop: Callable[[], None]) -> str:
    """Make ``target`` hold the content of ``source`` and return how: ``reflink``, ``hard link`` or ``copy``.

    Raises:
        OSError: ``source`` cannot be read, is no regular file, or there is no room for a copy.
        Interrupted: ``check_stop`` raised it.
    """
    source = source.resolve(strict=True)  # a hard link to a symbolic link would not be the file
    with _open_regular(source) as descriptor:
        if clone_file(descriptor, target):
            return "reflink"
        if _link(source, descriptor, target):
            return HARD_LINK
        _copy(descriptor, target, size, reserve_bytes, check_stop)
        return "copy"


@contextmanager
def _open_regular(path: Path) -> Iterator[int]:
    # Non-blocking, so that a named pipe put in the file's place cannot hang us before it is refused.
    descriptor = os.open(path, system.READ | system.DO_NOT_WAIT | system.NO_LINKS)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def clone_file(descriptor: int, target: Path) -> bool:
    """Create ``target`` with the blocks of an open file, copied only when one of the two is written to.

    Returns false, with no ``target``, where the file system cannot do that.
    """
    if sys.platform != "linux":
        return False
    import fcntl

    clone = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        fcntl.ioctl(clone, _FICLONE, descriptor)
    except OSError:
        target.unlink()
        return False
    finally:
        os.close(clone)
    return True


def _link(source: Path, descriptor: int, target: Path) -> bool:
    status = os.fstat(descriptor)
    if not system.is_ours_alone(status):
        return False  # somebody else could write to it after it was verified: a copy is ours alone
    try:
        os.link(source, target)
    except OSError:
        return False
    if os.path.samestat(status, target.lstat()):
        return True
    target.unlink()
    return False


def _copy(descriptor: int, target: Path, size: int, reserve_bytes: int, check_stop: Callable[[], None]) -> None:
    if shutil.disk_usage(target.parent).free < size + reserve_bytes:
        raise OSError("it would have to be copied, and there is no room for that")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | system.CLOSE_ON_EXEC | system.BINARY
    copy = os.open(target, flags, 0o644)
    try:
        left = size
        while left and (chunk := os.read(descriptor, min(_COPY_BYTES, left))):
            check_stop()
            left -= len(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(copy, view) :]
    finally:
        os.close(copy)


def _hash_steady(
    path: Path, entry: FileEntry, partial: Partial, report: Report, check_stop: Callable[[], None]
) -> FileHashes:
    """Hash a file that somebody else may hold a name of, and refuse it if it changed meanwhile."""

    def advance(done: int) -> None:
        check_stop()
        report(BytesVerified(entry.path, done, entry.size or 0))

    algorithms = {"sha256", *(digest.algorithm for digest in entry.digests)}
    piece_length = entry.pieces.length if partial.known_pieces and entry.pieces else DEFAULT_PIECE_LENGTH
    descriptor = os.open(path, system.READ)
    try:
        system.sync_file(descriptor)  # what is hashed must be what the disk will hold, whoever wrote it
        before = os.fstat(descriptor)
        hashes = hash_file(path, sorted(algorithms), piece_length, advance)
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise IntegrityError(
            f"{entry.path} changed while it was read",
            detail="expected a file that nobody writes to, and it changed while it was read",
            hint="wait until whoever writes it is done",
        )
    return hashes


def _publish(layout: Layout, partial: Partial, shared: Path, blob: CommittedBlob, *, is_ours: bool) -> None:
    """Commit as a download is committed; only the mode of a hard link is left alone, being the user's file's too."""
    path = layout.blob(blob.sha256)
    with disk_errors("publishing an adopted file", path):
        partial.set_committed(blob)
        rename_durably(shared, path)
        if is_ours:
            path.chmod(0o444)
