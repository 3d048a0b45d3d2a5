"""Writes that survive a power cut, and disk errors in our own words.

Every rename is surrounded by fsyncs: of the file before it, so that the name never points at missing
bytes, and of the directory after it, so that the name itself survives.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.errors import OutOfSpace, StoreError, StoreNotWritable

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def disk_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the disk into a store error that names the path.

    Raises:
        OutOfSpace: No space or quota left, or the file system cannot hold a file this large.
        StoreNotWritable: Read-only or not permitted.
        StoreError: Any other I/O error.
    """
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, doing, path) from error


def explain_os_error(error: OSError, doing: str, path: Path) -> StoreError:
    """Return the store error that says what ``error`` means for ``doing`` at ``path``."""
    detail = f"expected to write there, got: {error.strerror or error}"
    if error.errno in _FULL:
        return OutOfSpace(
            f"no space left while {doing}: {path}",
            detail=detail,
            hint="free some space (mistral-fetch list shows what is kept), or choose another disk with --home or --out",
        )
    if error.errno in _REFUSED:
        return StoreNotWritable(
            f"not allowed to write while {doing}: {path}",
            detail=detail,
            hint="choose a writable place with --home DIR or MISTRAL_FETCH_HOME (or --out, when publishing)",
        )
    if isinstance(error, FileNotFoundError):
        return StoreError(
            f"something removed a file that was in use while {doing}: {path}",
            detail=f"expected it to stay until this process is done, got: {error.strerror or error}",
            hint="is another process at work on this cache, and do locks hold there? run the same command again",
        )
    return StoreError(
        f"the disk failed while {doing}: {path}",
        detail=detail,
        hint="check the disk (dmesg, mistral-fetch doctor), then run the same command again",
    )


def fsync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable. A system or file system that cannot is left alone."""
    system.sync_directory(directory)


def make_directory(directory: Path) -> None:
    """Create ``directory`` and its parents, each name durable."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    with suppress(FileExistsError):
        directory.mkdir()
    fsync_directory(directory.parent)


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data`` atomically: after a crash it holds all of the old or all of the new."""
    make_directory(path.parent)
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | system.BINARY, mode)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            system.sync_file(descriptor)
        finally:
            os.close(descriptor)
        system.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def rename_durably(source: Path, target: Path) -> None:
    """Rename within one file system; ``source`` must have been fsynced by its writer."""
    make_directory(target.parent)
    system.replace(source, target)
    fsync_directory(target.parent)
    if source.parent != target.parent:
        fsync_directory(source.parent)


def has_blocks(path: Path) -> bool:
    """Return whether a file has any bytes on the disk: a sparse file of holes alone has none, nor has a missing one."""
    try:
        return system.bytes_on_disk(path.stat()) > 0
    except OSError:
        return False


def boot_id() -> str:
    """Return a name for this run of the operating system, or '' where there is none.

    A page cache does not outlive it, so what an older boot wrote but did not sync may be gone.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def make_sparse(path: Path, size: int) -> None:
    """Create a file of ``size`` bytes that are all holes, in place of what is there."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def punch_hole(path: Path, start: int, length: int) -> bool:
    """Free the disk behind bytes that nobody will read again; return whether this system can (fallocate(2), Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file:
        offset, size = ctypes.c_int64(start), ctypes.c_int64(length)
        return bool(libc.fallocate(file.fileno(), _KEEP_SIZE | _PUNCH_HOLE, offset, size) == 0)
