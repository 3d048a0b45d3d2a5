"""One worker per ref across processes: a courtesy, bounded in time, that names its owner.

Correctness never rests on it (pieces are verified and written at their own offsets), because network file
systems lie about flock: where the lock cannot be had at all, the work goes on without.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

from mistral_fetch import system
from mistral_fetch.errors import StoreLocked
from mistral_fetch.store.durable import disk_errors, make_directory

POLL_SECONDS = 0.2


@contextmanager
def locked(
    path: Path, doing: str, timeout_seconds: float, on_wait: Callable[[str], None], check_stop: Callable[[], None]
) -> Iterator[None]:
    """Hold the lock at ``path`` for the duration of a ``with`` block.

    Args:
        path: The lock file; it stays afterwards, since removing it would race.
        doing: What the owner is doing, for those who wait.
        timeout_seconds: How long to wait for another owner.
        on_wait: Told once, in words, who holds the lock.
        check_stop: Called while waiting; may raise.

    Raises:
        StoreLocked: Another process kept the lock longer than ``timeout_seconds``.
        StoreError: The lock file cannot be created.
    """
    with disk_errors("locking the cache", path):
        make_directory(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, path, timeout_seconds, on_wait, check_stop)
        write_owner(descriptor, doing)
        yield
    finally:
        os.close(descriptor)  # closing releases the lock, as does any way of dying


def _acquire(
    descriptor: int, path: Path, timeout_seconds: float, on_wait: Callable[[str], None], check_stop: Callable[[], None]
) -> None:
    deadline = time.monotonic() + timeout_seconds
    told = False
    while not _try_lock(descriptor):
        check_stop()
        owner = describe_owner(path)
        if time.monotonic() >= deadline:
            raise StoreLocked(
                f"another process is working on {_shown(path)}",
                detail=f"waited {timeout_seconds:g} s for {owner}",
                hint="wait for it, or stop it; --lock-timeout SECONDS changes how long to wait",
            )
        if not told:
            on_wait(owner)
            told = True
        time.sleep(POLL_SECONDS)


def try_share(descriptor: int) -> bool:
    """Take a lock that other readers may hold too; return whether nobody holds it alone."""
    return _try_lock(descriptor, is_shared=True)


def _try_lock(descriptor: int, *, is_shared: bool = False) -> bool:
    # None means that there are no locks here: the work goes on without the courtesy.
    return system.try_lock(descriptor, is_shared=is_shared) is not False


def write_owner(descriptor: int, doing: str) -> None:
    """Note in a lock file, for people, who holds it and why."""
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "doing": doing, "since": int(time.time())}
    with suppress(OSError):  # a full disk: the lock is held without its note, and the work will say what is wrong
        os.ftruncate(descriptor, 0)
        system.write_at(descriptor, json.dumps(owner).encode(), 0)


def _shown(path: Path) -> str:
    """Return the ref that a lock in ``locks/`` stands for; a partial's own lock is known by its directory."""
    return unquote(path.name if path.parent.name == "locks" else path.parent.name)


def describe_owner(path: Path) -> str:
    """Return who holds the lock, in words; the note may be torn, so nothing depends on it."""
    try:
        owner = json.loads(path.read_bytes()[:4096])
        age = max(0, int(time.time()) - int(owner["since"]))
        return f"process {owner['pid']} on {owner['host']} ({owner['doing']}), for {age} s"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that left no name"
