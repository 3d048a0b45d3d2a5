"""A source over ``file:`` addresses: a manifest on a disk or USB stick beside its files. Never a network.

Only manifests that were read from a local disk may lead here; whoever resolved the model saw to that.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mistral_fetch import system
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import (
    IntegrityError,
    MirrorError,
    MirrorUnreachable,
    MistralFetchError,
    PieceMismatch,
    SizeMismatch,
)
from mistral_fetch.events import BytesReceived, Progress, Report, SourceConnected, SourceFailed
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.failover import give_up, known_size, mirror_urls, report_lie
from mistral_fetch.spans import Span


class LocalSource:
    """Copies pieces from files on this machine, verified exactly as bytes from a network are."""

    assurance = Assurance.SIZE

    def __init__(self, label: str = "local files") -> None:
        self.label = label

    def fetch(self, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        """Fill every target's partial from the first of its ``file:`` addresses that delivers.

        Raises:
            AllSourcesFailed, MirrorError, IntegrityError: No address of a file delivers.
            StoreError, Interrupted: See :class:`~mistral_fetch.sources.base.Source`.
        """
        for target in targets:
            stop.check()
            try:
                self._fetch_file(target, report, stop)
            finally:
                target.partial.flush()

    def _fetch_file(self, target: Target, report: Report, stop: StopSignal) -> None:
        known_size(target.entry)
        target.partial.prepare()
        if not target.partial.missing_pieces():
            report(Progress(target.entry.path, target.partial.present_bytes))
            return
        causes: list[MistralFetchError] = []
        for url in mirror_urls(target.entry, {"file"}):
            try:
                self._copy(url, target, report, stop)
            except (MirrorError, IntegrityError) as error:
                report(SourceFailed(self.label, f"{error.what}: {error.detail}", will_retry=False))
                causes.append(error)
            else:
                return
        raise give_up(target.entry, causes, "local file")

    def _copy(self, url: str, target: Target, report: Report, stop: StopSignal) -> None:
        partial, path = target.partial, target.entry.path
        source = local_path(url)
        buffer = memoryview(bytearray(min(partial.grid.piece_length, partial.grid.size)))
        with _open_regular(source, partial.grid.size) as descriptor:
            report(SourceConnected(self.label))
            while missing := partial.missing_pieces():
                for index in missing:
                    stop.check()
                    piece = _read(descriptor, source, buffer, partial.grid.span(index))
                    report(BytesReceived(self.label, path, len(piece)))
                    self._put(target, index, piece, source, report)
                    report(Progress(path, partial.present_bytes))
                partial.flush()

    def _put(self, target: Target, index: int, piece: memoryview, source: Path, report: Report) -> None:
        try:
            target.partial.put(index, piece, str(source))
        except PieceMismatch:
            report_lie(target, index, piece, self.label, report)
            raise


def local_path(url: str) -> Path:
    """Return the path that a ``file:`` address names (RFC 8089).

    Raises:
        MirrorUnreachable: It names another host, or no absolute path.
    """
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"} or not path.startswith("/") or "\0" in path:
        raise _permanent(f"{url[:200]!r} is not a file on this machine", "expected file:///absolute/path")
    return Path(path)


@contextmanager
def _open_regular(path: Path, size: int) -> Iterator[int]:
    try:
        # Non-blocking, so that a named pipe put in the file's place cannot hang us before it is refused.
        descriptor = os.open(path, system.READ | system.DO_NOT_WAIT)
    except OSError as error:
        raise _permanent(f"cannot read {path}", f"expected a file, got: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _permanent(f"{path} is no regular file", "expected a file, got a directory, pipe or device")
        if status.st_size != size:
            raise _other_size(path, size, status.st_size)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: Path, buffer: memoryview, span: Span) -> memoryview:
    piece = buffer[: span.length]
    try:
        got = system.read_into(descriptor, piece, span.start)
    except OSError as error:
        raise _permanent(f"cannot read {path}", f"expected bytes {span}, got: {error.strerror}") from error
    if got != span.length:
        raise _other_size(path, span.end, span.start + got)
    return piece


def _other_size(path: Path, size: int, actual: int) -> SizeMismatch:
    return SizeMismatch(
        f"{path} has another size than promised",
        detail=f"expected {size} bytes, got {actual}",
        hint="copy the file again, or use another source",
    )


def _permanent(what: str, detail: str) -> MirrorUnreachable:
    error = MirrorUnreachable(what, detail=detail, hint="check the path, or use another source")
    error.is_permanent = True
    return error
