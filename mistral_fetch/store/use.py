"""Who uses a snapshot, now and last: a lock that readers share, and a file whose time is that of the last use.

Both are courtesies. A cache that may only be read is used without either.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mistral_fetch.errors import NotInCache
from mistral_fetch.store.durable import make_directory
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import try_share, write_owner
from mistral_fetch.store.snapshots import is_complete

# Whoever removes something holds its lock for an instant; longer than this it would be something else.
_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.05


def note_use(layout: Layout, directory: Path) -> None:
    """Note that a snapshot, or what was made of it, is used now. Costs one system call where that was noted before."""
    digest = _digest_in(layout, directory)
    if digest is None:
        return
    path = layout.used(digest)
    with suppress(OSError):
        try:
            os.utime(path)
        except FileNotFoundError:
            make_directory(path.parent)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))


def last_used(layout: Layout, content_digest: str) -> float:
    """Return when a snapshot was used last, in seconds since 1970; 0 where nobody noted it."""
    try:
        return layout.used(content_digest).stat().st_mtime
    except OSError:
        return 0.0


@contextmanager
def in_use(layout: Layout, directory: Path, doing: str) -> Iterator[None]:
    """Keep a snapshot, or what was made of it, from being removed while a ``with`` block reads it.

    Directories that are not this cache's are left alone.

    Raises:
        NotInCache: It was removed just before.
    """
    digest = _digest_in(layout, directory)
    descriptor = None if digest is None else _open(layout.use_lock(digest))
    try:
        if descriptor is not None:
            _share(descriptor, doing)
        if digest is not None and not is_complete(directory):
            raise NotInCache(
                f"{directory} is not complete any more",
                detail="expected it to stay until it is used, but another process removed it",
                hint="run the same command again",
            )
        note_use(layout, directory)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _digest_in(layout: Layout, directory: Path) -> str | None:
    """Return the content digest of the snapshot that a directory of this cache is, or was made of."""
    is_ours = directory.parent == layout.snapshots or directory.parent.parent == layout.derivations
    return directory.name if is_ours else None


def _open(path: Path) -> int | None:
    with suppress(OSError):
        make_directory(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    return None


def _share(descriptor: int, doing: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not try_share(descriptor) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    write_owner(descriptor, doing)
