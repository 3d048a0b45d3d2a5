"""Where a bundle's bytes come from: one file, volumes that were split off it, or a pipe. Bytes without a meaning."""

from __future__ import annotations

import os
import re
import select
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mistral_fetch.errors import IntegrityError, NotFoundError, SizeMismatch, UsageError
from mistral_fetch.units import MIB

_SKIP_BYTES = 4 * MIB
_PIPE_BYTES = MIB
_WAIT_SECONDS = 0.2
_VOLUME = re.compile(r"(.+)\.(\d{3,6})")


class BundleInput:
    """Bytes by their offset; a context manager that closes what it opened.

    ``size`` is None for a pipe, which is read once, from its beginning: what lies before its position is gone.
    """

    size: int | None = None

    def __init__(self, label: str) -> None:
        self.label = label

    def __enter__(self) -> BundleInput:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close what was opened."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on.

        Raises:
            SizeMismatch: The bundle ends before.
            IntegrityError: It cannot be read, or not a second time.
        """
        raise NotImplementedError

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on; see :meth:`read_into`."""
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def has_more(self, offset: int) -> bool:
        """Return whether there is anything from ``offset`` on."""
        raise NotImplementedError

    def _cut_short(self, offset: int) -> SizeMismatch:
        return SizeMismatch(
            f"{self.label} ends in the middle of the bundle",
            detail=f"expected more than its {offset} bytes, got its end",
            hint="copy it again, or name the volumes that are missing; what was verified is kept",
        )

    def _unreadable(self, offset: int, error: OSError) -> IntegrityError:
        return IntegrityError(
            f"{self.label} cannot be read",
            detail=f"expected bytes from {offset} on, got: {error.strerror or error}",
            hint="check the disk or the connection, then run the same command again: what was verified is kept",
        )


class FileInput(BundleInput):
    """One file, or several that make up one when they are joined. May be read by several threads."""

    size: int

    def __init__(self, label: str, descriptors: Sequence[int]) -> None:
        super().__init__(label)
        self._descriptors = list(descriptors)
        self._ends: list[int] = []
        for descriptor in descriptors:
            self._ends.append((self._ends[-1] if self._ends else 0) + os.fstat(descriptor).st_size)
        self.size = self._ends[-1]

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors:
            os.close(descriptor)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; see the base class."""
        for descriptor, end, start in zip(self._descriptors, self._ends, [0, *self._ends[:-1]], strict=True):
            while view and start <= offset < end:
                try:
                    length = os.preadv(descriptor, [view[: end - offset]], offset - start)
                except OSError as error:
                    raise self._unreadable(offset, error) from error
                if not length:
                    raise self._cut_short(offset)  # it shrank since it was opened
                view, offset = view[length:], offset + length
        if view:
            raise self._cut_short(offset)

    def has_more(self, offset: int) -> bool:
        """Return whether there is anything from ``offset`` on."""
        return self.size > offset


class PipeInput(BundleInput):
    """A stream: a pipe, a tape, a socket. ``check_stop`` is called while nothing comes, and may raise."""

    def __init__(self, label: str, descriptor: int, check_stop: Callable[[], None]) -> None:
        super().__init__(label)
        self._descriptor = descriptor
        self._check_stop = check_stop
        self._position = 0
        _widen(descriptor)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, after reading past what lies before; see the base class."""
        if offset < self._position:
            raise IntegrityError(
                f"{self.label} cannot be read twice",
                detail=f"expected bytes from {offset} on, got only what follows {self._position}",
                hint="run the same command again: what was verified is kept; or give the bundle as a file",
            )
        if offset > self._position:
            scratch = memoryview(bytearray(min(_SKIP_BYTES, offset - self._position)))
            while self._position < offset:
                self._fill(scratch[: offset - self._position])
        self._fill(view)

    def has_more(self, offset: int) -> bool:
        """Return whether there is anything from ``offset`` on, which is waited for."""
        self.read_into(offset, memoryview(b""))
        self._wait()
        try:
            return bool(os.read(self._descriptor, 1))
        except OSError as error:
            raise self._unreadable(offset, error) from error

    def _wait(self) -> None:
        while not select.select([self._descriptor], [], [], _WAIT_SECONDS)[0]:
            self._check_stop()

    def _fill(self, view: memoryview) -> None:
        while view:
            self._wait()
            try:
                length = os.readv(self._descriptor, [view])
            except OSError as error:
                raise self._unreadable(self._position, error) from error
            if not length:
                raise self._cut_short(self._position)
            view, self._position = view[length:], self._position + length


def _widen(descriptor: int) -> None:
    """Let more lie in a pipe than the usual 64 KiB, so that its writer and we wait less for each other (Linux)."""
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError, AttributeError):  # no pipe, or more than this user may have
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _never() -> None:
    """Go on."""


def open_input(paths: Sequence[str], check_stop: Callable[[], None] = _never, standard_input: int = 0) -> BundleInput:
    """Open what a person named: a bundle, its volumes in any order, or ``-`` for standard input.

    Args:
        paths: What was typed.
        check_stop: Called while a pipe is waited for; may raise.
        standard_input: The descriptor that ``-`` means.

    Raises:
        UsageError: ``-`` among others, or files that are not the volumes of one bundle.
        NotFoundError: One cannot be opened, or a number between two volumes is missing.
    """
    if list(paths) == ["-"]:
        return _open_standard_input(standard_input, check_stop)
    if "-" in paths:
        raise UsageError(
            "standard input is a whole bundle",
            detail=f"expected - alone, got {len(paths)} names",
            hint="join volumes for a pipe: cat NAME.* | mistral-fetch bundle import -",
        )
    ordered = [Path(paths[0])] if len(paths) == 1 else _in_order(paths)
    descriptors: list[int] = []
    try:
        for path in ordered:
            descriptors.append(_open_regular(path))
    except BaseException:
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)
        raise
    label = ordered[0].name if len(ordered) == 1 else f"{ordered[0].stem} ({len(ordered)} volumes)"
    return FileInput(label, descriptors)


def _open_standard_input(descriptor: int, check_stop: Callable[[], None]) -> BundleInput:
    # A file that the shell opened (< FILE) can be read at any place, unless somebody has read from it.
    if stat.S_ISREG(os.fstat(descriptor).st_mode) and os.lseek(descriptor, 0, os.SEEK_CUR) == 0:
        return FileInput("standard input", [os.dup(descriptor)])
    return PipeInput("standard input", descriptor, check_stop)


def _in_order(paths: Sequence[str]) -> list[Path]:
    """Return volumes by their number; the names must say that they belong together."""
    matches = [_VOLUME.fullmatch(Path(path).name) for path in paths]
    stems = {match[1] for match in matches if match}
    if not all(matches) or len(stems) != 1:
        raise UsageError(
            "these are not the volumes of one bundle",
            detail=f"expected NAME.001, NAME.002 and so on, got {', '.join(Path(path).name for path in paths)[:200]}",
            hint="name the volumes of one bundle, in any order, or a single file",
        )
    numbered = {int(match[2]): Path(path) for match, path in zip(matches, paths, strict=True) if match}
    if len(numbered) < len(paths):
        raise UsageError(
            "a volume is named twice",
            detail=f"expected each once, got {len(paths)} names for {len(numbered)} volumes",
            hint="name each volume once",
        )
    missing = next((number for number in range(1, len(paths) + 1) if number not in numbered), None)
    if missing is not None:
        raise NotFoundError(
            f"volume {missing} of {stems.pop()} is missing",
            detail=f"expected volumes 1 to {max(numbered)}, got {len(numbered)} of them",
            hint="name all volumes; copy the missing one again",
        )
    return [numbered[number] for number in sorted(numbered)]


def _open_regular(path: Path) -> int:
    try:
        # Non-blocking, so that a named pipe in the file's place cannot hang us before it is refused.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        reason = "no regular file; for a pipe, give - and redirect it"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise NotFoundError(f"cannot read {path}", detail=f"expected a bundle, got: {reason}", hint="check the path")
