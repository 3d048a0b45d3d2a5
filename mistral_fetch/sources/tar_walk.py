"""Where the files inside an uncompressed tar lie: its headers are walked, the data between them is skipped.

No network: bytes come from a function. What a header means is :mod:`.tar_headers`'s business. An archive comes
from outside, so nothing in it is believed: every size is held against the archive's own, the walk only goes
forwards, and headers are bounded in number and size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tarfile import TarInfo

from mistral_fetch.manifest import MAX_FILES, validate_paths
from mistral_fetch.sources.tar_headers import (
    BLOCK_BYTES,
    DIRECTORY,
    LONG_NAME,
    PAX,
    PAX_GLOBAL,
    REGULAR,
    damaged,
    decimal,
    decode_header,
    padded,
    pax_records,
    refused,
    refused_kind,
)
from mistral_fetch.units import KIB, MIB

WINDOW_BYTES = 64 * KIB
# A name has at most 1 KiB; what else an extended header may hold is a few dates and owners.
MAX_EXTENSION_BYTES = 64 * KIB
MAX_HEADER_BYTES = 64 * MIB
MAX_HEADERS = 4 * MAX_FILES
# tar fills its last record with zeros: 10 KiB by default, rarely as much as 1 MiB.
MAX_TRAILER_BYTES = 16 * MIB

Read = Callable[[int, int], bytes]
"""``read(offset, length)`` gives exactly these bytes of the archive, or raises."""


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar: its ``size`` bytes begin ``offset`` bytes into the archive."""

    path: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Return the offset of the first byte behind the file's."""
        return self.offset + self.size


class Window:
    """Serves small reads near one another from one larger read.

    Args:
        read: Gives bytes of the archive.
        whole_size: The archive's bytes.
    """

    def __init__(self, read: Read, whole_size: int) -> None:
        self.whole_size = whole_size
        self._read = read
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, which must lie within the archive."""
        position = offset - self._start
        if length and not 0 <= position <= len(self._data) - length:
            wanted = min(max(length, WINDOW_BYTES), self.whole_size - offset)
            self._data, self._start, position = self._read(offset, wanted), offset, 0
            if len(self._data) != wanted:
                raise damaged(f"expected {wanted} bytes at {offset}, got {len(self._data)}")
        return self._data[position : position + length]


def walk_tar(read: Read, whole_size: int) -> tuple[Member, ...]:
    """Return the regular files of a tar in the archive's order; directories are skipped.

    Args:
        read: Gives bytes of the archive; asked for about 64 KiB at each file, once for small neighbours.
        whole_size: The archive's bytes.

    Raises:
        UnsupportedFormat: Compressed, no tar, or with an entry that is no plain file (link, device, sparse).
        MalformedManifest: Damaged, cut short, too many entries, or headers too large to be honest.
        UnsafePath: A name would leave its directory or clashes with another.
    """
    members = tuple(_Walk(Window(read, whole_size)).members())
    validate_paths(member.path for member in members)
    return members


class _Walk:
    """One pass over the headers; the offset only ever grows, by at least one block a step."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._offset = 0
        self._header_bytes = 0
        self._found = 0
        # What extended headers say of the entry that follows them.
        self._path: str | None = None
        self._size: int | None = None

    def members(self) -> Iterator[Member]:
        """Yield every regular file up to the end mark, a block of zeros."""
        for _ in range(MAX_HEADERS):
            at = self._offset
            block = self._take(BLOCK_BYTES)
            if not block.strip(b"\0"):
                self._check_end()
                return
            member = self._entry(decode_header(block, at))
            if member is not None:
                yield member
        raise damaged(f"expected at most {MAX_HEADERS} headers, got more")

    def _take(self, length: int) -> bytes:
        end = self._offset + length
        if end > self._window.whole_size:
            raise damaged(f"expected an entry or the end mark at {self._offset}, got the end: it is cut short")
        self._header_bytes += length
        if self._header_bytes > MAX_HEADER_BYTES:
            raise damaged(f"expected at most {MAX_HEADER_BYTES} bytes of headers, got more")
        data = self._window.read(self._offset, length)
        self._offset = end
        return data

    def _entry(self, header: TarInfo) -> Member | None:
        if header.type in PAX:
            self._note_records(pax_records(self._extension(header)))
        elif header.type == PAX_GLOBAL:
            if {"path", "size"} & pax_records(self._extension(header)).keys():
                raise refused("one name or size for all of them", header.name)
        elif header.type == LONG_NAME:
            self._note_path(self._extension(header).partition(b"\0")[0])
        else:
            path, size = self._path or header.name, header.size if self._size is None else self._size
            self._path = self._size = None
            return self._file(header.type, path, size)
        return None

    def _file(self, kind: bytes, path: str, size: int) -> Member | None:
        if kind == DIRECTORY:
            if size:
                raise damaged(f"expected no data in the directory {path[:120]!r}, got {size} bytes")
            return None
        if kind not in REGULAR:
            raise refused_kind(kind, path)
        path = path.removeprefix("./")  # what `tar c .` writes
        left = self._window.whole_size - self._offset
        if not 0 <= size <= left:
            raise damaged(f"expected 0 to {left} bytes of {path[:120]!r}, got {size}")
        self._found += 1
        if self._found > MAX_FILES:
            raise damaged(f"expected at most {MAX_FILES} files, got more")
        member = Member(path, self._offset, size)
        self._offset += padded(size)
        return member

    def _extension(self, header: TarInfo) -> bytes:
        if not 0 <= header.size <= MAX_EXTENSION_BYTES:
            raise damaged(f"expected at most {MAX_EXTENSION_BYTES} bytes of extended header, got {header.size}")
        return self._take(padded(header.size))[: header.size]

    def _note_records(self, records: dict[str, bytes]) -> None:
        if any(key.startswith("GNU.sparse.") for key in records):
            raise refused("a sparse file", records.get("GNU.sparse.name", b"").decode("utf-8", "replace"))
        if "path" in records:
            self._note_path(records["path"])
        if "size" in records:
            self._size = decimal(records["size"])

    def _note_path(self, path: bytes) -> None:
        if self._path is not None or not path:
            # Programs differ in which of two names they take.
            raise damaged("expected one long name for an entry, got two or an empty one")
        self._path = path.decode("utf-8", "surrogateescape")

    def _check_end(self) -> None:
        if self._path is not None or self._size is not None:
            raise damaged("expected an entry after its extended header, got the end mark")
        left = self._window.whole_size - self._offset
        if left > MAX_TRAILER_BYTES:
            raise damaged(f"expected at most {MAX_TRAILER_BYTES} bytes behind the end mark, got {left}")
