"""Writing a bundle: to a file that appears when it is complete, to volumes, or to a stream."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mistral_fetch.bundle.contents import Content
from mistral_fetch.bundle.pack import Packed, damaged
from mistral_fetch.errors import Conflict, Interrupted, OutOfSpace, StoreError, UsageError
from mistral_fetch.events import Progress, Report, TransferPlanned
from mistral_fetch.store.durable import disk_errors, fsync_directory
from mistral_fetch.units import KIB, format_size

MIN_VOLUME_BYTES = 64 * KIB
MAX_VOLUMES = 9999


class Sink(Protocol):
    """Takes a bundle's bytes in order."""

    def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data``."""


@dataclass
class StreamSink:
    """A pipe or a terminal's redirection."""

    descriptor: int

    def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data``.

        Raises:
            Interrupted: Whoever read the stream has gone.
            StoreError: It cannot be written.
        """
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.descriptor, view) :]
        except BrokenPipeError as error:
            raise Interrupted(
                "whoever read the bundle has gone",
                detail="expected a reader until the end, got a closed pipe",
                hint="look at what the reader said",
            ) from error
        except OSError as error:
            raise StoreError(
                "the bundle cannot be written to standard output",
                detail=f"expected room for it, got: {error.strerror}",
                hint="write it elsewhere with -o FILE",
            ) from error


class VolumeSink:
    """A file, or files of ``split_bytes`` each, under hidden names until all of them are complete."""

    def __init__(self, target: Path, split_bytes: int | None) -> None:
        self.target = target
        self._split = split_bytes
        self._suffix = f".{secrets.token_hex(6)}.tmp"
        self._hidden: list[Path] = []
        self._descriptor: int | None = None
        self._room = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data``.

        Raises:
            OSError: The disk refused.
        """
        view = memoryview(data)
        while view:
            descriptor = self._open()
            part = view if self._split is None else view[: self._room]
            written = os.write(descriptor, part)
            view, self._room = view[written:], self._room - written

    def publish(self) -> list[Path]:
        """Give what was written its names, durably, and return them.

        Raises:
            OSError: The disk refused.
        """
        self._close()
        names = [self._name(number) for number in range(1, len(self._hidden) + 1)]
        for hidden, name in zip(self._hidden, names, strict=True):
            hidden.replace(name)
        fsync_directory(self.target.parent)
        return names

    def discard(self) -> None:
        """Remove what has no name yet."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        for hidden in self._hidden:
            hidden.unlink(missing_ok=True)

    def _open(self) -> int:
        if self._descriptor is None or (self._split is not None and not self._room):
            self._close()
            name = self._name(len(self._hidden) + 1)
            self._hidden.append(name.with_name(f".{name.name}{self._suffix}"))
            self._descriptor = os.open(self._hidden[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            self._room = self._split or 0
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            # Named only when all of it is on the disk.
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _name(self, number: int) -> Path:
        return self.target if self._split is None else volume_name(self.target, number)


def volume_name(target: Path, number: int) -> Path:
    """Return ``NAME.001`` and so on."""
    return target.with_name(f"{target.name}.{number:03d}")


@contextmanager
def writing_to(target: Path, split_bytes: int | None, size: int, reserve_bytes: int) -> Iterator[VolumeSink]:
    """Open a file or volumes for a bundle of ``size`` bytes, and remove them unless they were published.

    Raises:
        UsageError: The volumes would be too many.
        Conflict: There is something of that name.
        OutOfSpace, StoreError: The disk has no room, or refuses.
    """
    if split_bytes is not None and not (split_bytes >= MIN_VOLUME_BYTES and size <= split_bytes * MAX_VOLUMES):
        raise UsageError(
            f"volumes of {format_size(split_bytes)} are too small",
            detail=f"expected at least {format_size(MIN_VOLUME_BYTES)}, and at most {MAX_VOLUMES} volumes",
            hint="give a larger --split",
        )
    first = target if split_bytes is None else volume_name(target, 1)
    if os.path.lexists(first):
        raise Conflict(
            f"{first} is there already",
            detail="expected a name that is free, got a file",
            hint="remove it, or give another name with -o",
        )
    sink = VolumeSink(target, split_bytes)
    with disk_errors("writing a bundle", target):
        free = shutil.disk_usage(target.parent).free
        if free < size + reserve_bytes:
            raise OutOfSpace(
                f"not enough space for a bundle in {target.parent}",
                detail=f"expected {format_size(size + reserve_bytes)} free, got {format_size(free)}",
                hint="give a place on another disk with -o, or pipe it there: -o -",
            )
        try:
            yield sink
        finally:
            sink.discard()


def write_bundle(packed: Packed, sink: Sink, report: Report, check_stop: Callable[[], None]) -> None:
    """Write a bundle; each content is hashed again on its way out, so that damage is not handed on.

    Raises:
        IntegrityError: A file of the cache is not what its manifest says.
        StoreError: It cannot be read.
        OSError: The sink's disk refused.
        Interrupted: ``check_stop`` raised it.
    """
    total = sum(content.entry.size or 0 for content in packed.plan.contents)
    label = packed.records[0].ref if len(packed.records) == 1 else f"{len(packed.records)} models"
    report(TransferPlanned(label, total, 0, len(packed.plan.contents)))
    sink.write(packed.beginning)
    with ThreadPoolExecutor(1) as pool:
        for content in packed.plan.contents:
            sink.write(content.frame)
            _copy(packed, content, sink, pool, report, check_stop)
    sink.write(packed.plan.tail)


def _copy(
    packed: Packed,
    content: Content,
    sink: Sink,
    pool: ThreadPoolExecutor,
    report: Report,
    check_stop: Callable[[], None],
) -> None:
    """Copy one file piece by piece; while a piece is hashed, the one before it is written."""
    entry, record = content.entry, packed.records[content.model]
    if not entry.size or entry.pieces is None:
        return
    path = packed.places[entry.sha256 or ""]
    buffers = [bytearray(min(entry.pieces.length, entry.size)) for _ in range(2)]
    hashing: tuple[Future[str], memoryview] | None = None
    done = 0

    def write_hashed(index: int, future: Future[str], piece: memoryview) -> None:
        expected, actual = entry.pieces.sha256[index] if entry.pieces else "", future.result()
        if actual != expected:
            raise damaged(record.ref, entry.path, f"piece {index}: expected sha256:{expected}, got sha256:{actual}")
        sink.write(piece)

    with disk_errors("reading what the cache holds", path):
        file = path.open("rb", buffering=0)
    with file:
        for index in range(len(entry.pieces.sha256)):
            check_stop()
            piece = memoryview(buffers[index % 2])[: min(entry.pieces.length, entry.size - done)]
            _read_full(file.fileno(), path, piece, done, record.ref, entry.path)
            begun = pool.submit(lambda view: hashlib.sha256(view).hexdigest(), piece)
            if hashing is not None:
                write_hashed(index - 1, *hashing)
            hashing, done = (begun, piece), done + len(piece)
            report(Progress(f"{record.folder}/{entry.path}", done))
        if hashing is not None:
            write_hashed(len(entry.pieces.sha256) - 1, *hashing)


def _read_full(descriptor: int, path: Path, view: memoryview, offset: int, ref: str, name: str) -> None:
    while view:
        with disk_errors("reading what the cache holds", path):
            length = os.preadv(descriptor, [view], offset)
        if not length:
            raise damaged(ref, name, f"expected bytes from {offset} on, got its end")
        view, offset = view[length:], offset + length
