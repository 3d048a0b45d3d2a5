"""What differs between operating systems, each difference in one function, chosen when it is called.

Linux is where everything is used and tested. What other systems have instead is written down here and tested by
taking Linux's own away (``docs/platforms.md`` says what that proves). It imports nothing of ours.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Flags of os.open that some systems lack; O_BINARY is what Windows needs to leave line ends alone.
BINARY: int = getattr(os, "O_BINARY", 0)
CLOSE_ON_EXEC: int = getattr(os, "O_CLOEXEC", 0)
DO_NOT_WAIT: int = getattr(os, "O_NONBLOCK", 0)
NO_LINKS: int = getattr(os, "O_NOFOLLOW", 0)
NO_TERMINAL: int = getattr(os, "O_NOCTTY", 0)
READ: int = os.O_RDONLY | BINARY | CLOSE_ON_EXEC

_BUSY = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK}
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP}
_RENAME_TRIES = 10
_RENAME_PAUSE_SECONDS = 0.1
# CreateFile's MAX_PATH without long paths enabled, less the closing NUL.
WINDOWS_MAX_PATH = 259
# Names of devices in every folder, whatever follows a dot ("Naming Files, Paths, and Namespaces", Microsoft).
_WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_WINDOWS_FORBIDDEN = re.compile(r'[<>:"\\|?*\x00-\x1f]')

# Where there is no reading and writing at an offset, the file's own position is moved, by one thread at a time.
_position = threading.Lock()


def is_windows() -> bool:
    """Return whether this is Windows."""
    return os.name == "nt"


def is_macos() -> bool:
    """Return whether this is macOS."""
    return str(sys.platform) == "darwin"


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from a file at ``offset``; return how many bytes there were. From any thread."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    data = read_at(descriptor, len(view), offset)
    view[: len(data)] = data
    return len(data)


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Return up to ``length`` bytes of a file at ``offset``. From any thread."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Write at ``offset`` of a file; return how many bytes were taken. From any thread."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def sync_file(descriptor: int, *, data_only: bool = False) -> None:
    """Make what was written to a file survive a power cut.

    macOS's fsync(2) stops at the drive's own cache; F_FULLFSYNC goes on (fcntl(2)). ``data_only`` leaves times out,
    where a system can.
    """
    if is_macos() and _full_sync(descriptor):
        return
    (getattr(os, "fdatasync", os.fsync) if data_only else os.fsync)(descriptor)


def _full_sync(descriptor: int) -> bool:
    import fcntl

    try:
        fcntl.fcntl(descriptor, getattr(fcntl, "F_FULLFSYNC", 51))
    except OSError as error:
        if error.errno not in {*_CANNOT_SYNC, errno.ENOTTY}:
            raise
        return False  # a file system over a network: as good as it gets there
    return True


def sync_path(path: Path) -> None:
    """Make a file that somebody else wrote survive a power cut; Windows can only where it may write to it."""
    descriptor = os.open(path, (os.O_RDWR | BINARY) if is_windows() else READ)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut. Windows has no such call: NTFS keeps a journal of names."""
    if is_windows():
        return
    descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path, pause: Callable[[float], None] = time.sleep) -> None:
    """Rename over what is there, atomically.

    Windows refuses while somebody has either file open without sharing it, such as a virus scanner for a moment: there
    it is tried again for a second. A read-only target is made writable first, for there that forbids it too.
    """
    if not is_windows():
        source.replace(target)
        return
    for tries_left in reversed(range(_RENAME_TRIES)):
        try:
            source.replace(target)
        except PermissionError:
            if not tries_left:
                raise
            if target.is_file():
                target.chmod(stat.S_IWRITE | stat.S_IREAD)
            pause(_RENAME_PAUSE_SECONDS)
        else:
            return


def try_lock(descriptor: int, *, is_shared: bool = False) -> bool | None:
    """Take a file's lock without waiting; None where there are no locks. It ends when the descriptor is closed.

    flock(2) where there is one. Windows has locks of one process alone, so there a shared one is one too (msvcrt's
    locking, over the byte at 2 GiB, so that the text in the file can still be read).
    """
    module: Any
    if is_windows():
        import msvcrt as module
    else:
        try:
            import fcntl as module
        except ImportError:
            return None
    try:
        if is_windows():
            os.lseek(descriptor, (1 << 31) - 1, os.SEEK_SET)
            module.locking(descriptor, module.LK_NBLCK, 1)
        else:
            module.flock(descriptor, (module.LOCK_SH if is_shared else module.LOCK_EX) | module.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def is_alive(process: int) -> bool:
    """Return whether a process of this number runs on this machine."""
    if is_windows():
        return _is_alive_on_windows(process)  # where signal 0 would be Ctrl-C
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def _is_alive_on_windows(process: int) -> bool:
    import ctypes

    kernel: Any = vars(ctypes)["windll"].kernel32
    handle = kernel.OpenProcess(0x1000, False, process)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return bool(kernel.GetLastError() == 5)  # ERROR_ACCESS_DENIED: it is there, but somebody else's
    try:
        return bool(kernel.WaitForSingleObject(handle, 0) == 0x102)  # WAIT_TIMEOUT: it has not ended
    finally:
        kernel.CloseHandle(handle)


def is_ours_alone(status: os.stat_result) -> bool:
    """Return whether a file belongs to this user and nobody else may write to it; false where that is not known."""
    return hasattr(os, "geteuid") and status.st_uid == os.geteuid() and not status.st_mode & stat.S_IWOTH


def bytes_on_disk(status: os.stat_result) -> int:
    """Return what a file takes of the disk, holes left out; where that is not told, its size."""
    blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else blocks * 512  # POSIX's unit, whatever the file system's is


def usable_cores() -> int:
    """Return how many cores this process may run on; where the system does not tell, how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def windows_objection(path: str) -> str:
    """Return why no file can have this relative POSIX path on Windows, or '' where one can."""
    for part in path.split("/"):
        if _WINDOWS_DEVICES.fullmatch(part):
            return f"{part} is the name of a device there"
        if _WINDOWS_FORBIDDEN.search(part):
            return f"{part!r} holds a character that no name may hold there"
        if part != part.rstrip(" ."):
            return f"{part!r} ends in a space or a dot, which is cut off there"
    return ""


def objection(path: str, directory: Path) -> str:
    """Return why this system cannot keep a file at ``path`` below ``directory``, or ''; POSIX systems have none."""
    if not is_windows():
        return ""
    length = len(str(directory)) + 1 + len(path)
    if length > WINDOWS_MAX_PATH:
        return f"{length} characters are more than the {WINDOWS_MAX_PATH} of a path there"
    return windows_objection(path)
