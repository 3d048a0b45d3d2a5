"""One new file, written from front to back, hashed and synced meanwhile, that has its name only once it is durable.

Owns the order of writing, hashing, syncing and naming. Knows nothing of what the bytes are.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# What one request to the kernel copies: the hash follows as soon as it is done, out of the processor's cache.
COPY_BYTES = 4 << 20
# So much is left unsynced at a time: the disk works from the start, and the last sync is short.
SYNC_BYTES = 256 << 20
_HASH_BYTES = 1 << 20
# The file systems, or the kernel, cannot copy between these two files by themselves.
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}


class FileWriter:
    """Appends to a new file. What is hashed is read back from it, so that the digest is the file's, not the source's.

    One thread hashes and one syncs, while the caller goes on to write.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hasher = hashlib.sha256()
        self._buffer = bytearray(_HASH_BYTES)
        self._position = self._hashed = self._synced = 0
        self._hash_thread, self._sync_thread = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._hash: Future[None] | None = None
        self._sync: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        while data:
            written = os.pwrite(self._descriptor, data, self._position)
            self._advance(written)
            data = data[written:]

    def copy(self, source: int, offset: int, length: int) -> int:
        """Append a span of another file by the kernel alone; return how many bytes of it could be copied that way."""
        done = 0
        while done < length and hasattr(os, "copy_file_range"):
            try:
                wanted = min(COPY_BYTES, length - done)
                copied = os.copy_file_range(source, self._descriptor, wanted, offset + done, self._position)
            except OSError as error:
                if error.errno in _CANNOT_COPY:
                    break
                raise
            if not copied:
                raise OSError(errno.EIO, "the file that is copied became shorter")
            self._advance(copied)
            done += copied
        return done

    def finish(self) -> str:
        """Make all of the file durable and return its sha256."""
        self._await_sync()
        os.fsync(self._descriptor)
        if self._hash is not None:
            self._hash.result()
        return self._hasher.hexdigest()

    def close(self) -> None:
        """Let the threads end, and close the file."""
        self._hash_thread.shutdown(cancel_futures=True)
        self._sync_thread.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def _advance(self, length: int) -> None:
        self._position += length
        # Only the last one is asked how it went: each goes on where the one before it ended or failed.
        self._hash = self._hash_thread.submit(self._hash_up_to, self._position)
        if self._position - self._synced >= SYNC_BYTES:
            self._await_sync()
            self._synced = self._position
            self._sync = self._sync_thread.submit(os.fsync, self._descriptor)

    def _hash_up_to(self, position: int) -> None:
        while self._hashed < position:
            view = memoryview(self._buffer)[: position - self._hashed]
            length = os.preadv(self._descriptor, [view], self._hashed)
            if not length:
                raise OSError(errno.EIO, "the file that is written became shorter")
            self._hasher.update(view[:length])
            self._hashed += length

    def _await_sync(self) -> None:
        # Its errors are ours: the kernel reports a failed sync once.
        if self._sync is not None:
            self._sync.result()
            self._sync = None


@contextmanager
def new_file(target: Path) -> Iterator[FileWriter]:
    """Write a file under a hidden name in the ``with`` block, and name it at the end, which must `finish` it.

    Whatever is raised inside leaves nothing; a kill leaves a hidden file.

    Raises:
        OSError: The disk refused.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    writer = FileWriter(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    try:
        try:
            yield writer
        finally:
            writer.close()
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
