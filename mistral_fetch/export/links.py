"""A second name for a blob, in the way that was asked for; and directories that appear when they are complete."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from mistral_fetch.errors import Conflict, OutOfSpace, UsageError
from mistral_fetch.store.adopt import clone_file
from mistral_fetch.store.durable import disk_errors, fsync_directory, make_directory, write_durably
from mistral_fetch.units import MIB, format_size

_COPY_BYTES = 4 * MIB


class LinkMode(Enum):
    """How an export gets at bytes of the cache; SHARE is a reflink, or else a hard link."""

    SHARE = "share"
    SYMBOLIC = "symbolic"
    COPY = "copy"


class Placer:
    """Puts blobs under other names, and remembers in which ways.

    Args:
        mode: Which way is wanted.
        check_stop: Called while bytes are copied; may raise.
    """

    def __init__(self, mode: LinkMode, check_stop: Callable[[], None]) -> None:
        self.mode = mode
        self.ways: dict[str, int] = {}
        self._check_stop = check_stop

    def place(self, blob: Path, target: Path) -> None:
        """Make ``target``, which does not exist, hold what ``blob`` does.

        Raises:
            UsageError: The two are on different file systems, and no copy was asked for.
            OutOfSpace: There is no room for a copy.
            OSError: The disk refused.
        """
        blob = blob.resolve(strict=True)
        way = {LinkMode.SHARE: self._share, LinkMode.SYMBOLIC: _symbolic, LinkMode.COPY: self._copy}[self.mode]
        name = way(blob, target)
        self.ways[name] = self.ways.get(name, 0) + 1

    def told(self) -> str:
        """Return how files were placed, for people."""
        return ", ".join(f"{count} by {way}" for way, count in sorted(self.ways.items())) or "all were there already"

    def _share(self, blob: Path, target: Path) -> str:
        descriptor = os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if clone_file(descriptor, target):
                target.chmod(0o444)
                return "reflink"
        finally:
            os.close(descriptor)
        try:
            os.link(blob, target)
        except OSError as error:
            if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP}:
                raise
            raise UsageError(
                f"{target.name} cannot share its bytes with the cache",
                detail=f"expected a file system that both are on, and that has links, got: {error.strerror}",
                hint="link to the cache with --symlink, or copy with --copy, or choose a place on the cache's disk",
            ) from error
        return "hard link"

    def _copy(self, blob: Path, target: Path) -> str:
        size = blob.stat().st_size
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise OutOfSpace(
                f"no room for a copy of {target.name} in {target.parent}",
                detail=f"expected {format_size(size)} free, got {format_size(free)}",
                hint="link instead of copying, or choose another disk",
            )
        with blob.open("rb", buffering=0) as source, target.open("xb", buffering=0) as copy:
            while chunk := source.read(_COPY_BYTES):
                self._check_stop()
                view = memoryview(chunk)
                while view:
                    view = view[copy.write(view) :]
            os.fsync(copy.fileno())
        target.chmod(0o444)
        return "copy"


def _symbolic(blob: Path, target: Path) -> str:
    target.symlink_to(blob)
    return "symbolic link"


@contextmanager
def new_directory(final: Path, expected: Mapping[str, int]) -> Iterator[Path | None]:
    """Give a hidden directory to fill, which gets its name when the block ends well; None if it is there already.

    Args:
        final: Its name.
        expected: Sizes by path: a directory with just these files is the one that would be made.

    Raises:
        Conflict: There is something else of that name.
        StoreError: The disk refused.
    """
    if os.path.lexists(final) and not _is_empty_directory(final):
        if not holds_just(final, expected):
            raise Conflict(
                f"{final} is there already, and is something else",
                detail="expected a free name, or the same export, got other files",
                hint="remove it, or give another place with --to",
            )
        yield None
        return
    draft = final.with_name(f".{final.name[:100]}.{secrets.token_hex(6)}.tmp")
    with disk_errors("laying out an export", final):
        make_directory(final.parent)
        draft.mkdir()
        try:
            yield draft
            for directory in {draft, *(path.parent for path in draft.rglob("*"))}:
                fsync_directory(directory)
            draft.rename(final)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        fsync_directory(final.parent)


def holds_just(directory: Path, expected: Mapping[str, int]) -> bool:
    """Return whether a directory has these files with these sizes, and no others."""
    try:
        found = {
            path.relative_to(directory).as_posix(): path.stat().st_size
            for path in directory.rglob("*")
            if not path.is_dir()
        }
    except OSError:
        return False
    return found == dict(expected)


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def write_text(path: Path, text: str) -> None:
    """Write a small file of an export.

    Raises:
        OSError: The disk refused.
    """
    write_durably(path, text.encode())
