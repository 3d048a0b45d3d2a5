"""What the simulated mirror is told and what it tells: faults, contents, requests and replies. Values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_FIXED_DATE = "Wed, 27 Sep 2023 05:30:00 GMT"
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Fault:
    """One way to misbehave; fields combine.

    What is hit is said where the fault is scripted: the next request, each one, or those for certain bytes (see
    :class:`~mistral_fetch.simulators.mirror.MirrorSimulator`). The usual ones::

        wrong bytes                     Fault(wrong_bytes_at=(70_000,))
        body shorter than announced     Fault(end_at=1000)
        shorter range than claimed      Fault(short_by=100)
        part of the range, and said so  Fault(max_range_bytes=1000)
        whole file for a range          Fault(ignores_range=True)
        untrue Content-Range            Fault(content_range="bytes 0-99/256000")
        another range                   Fault(shift_range=100)
        416                             Fault(status=416, headers={"Content-Range": "bytes */256000"})
        429                             Fault(status=429)
        429 with Retry-After            Fault(status=429, headers={"Retry-After": "3"})
        503                             Fault(status=503)
        reset at a byte of the body     Fault(reset_at=1000)
        reset at a byte of the file     Fault(reset_at=70_000, offsets_in_file=True)
        trickle                         Fault(rate_bytes_per_second=1000)
        another ETag                    Fault(etag='"other"')
        stale version                   Fault(body=OLD, etag='"old"')
        redirect loop                   Fault(redirect_to="/model.bin")
        redirect to another host        Fault(redirect_to=other.url("model.bin"))
        gzip                            Fault(is_gzipped=True)
        never answers                   Fault(hang_at=-1)
        falls silent                    Fault(hang_at=1000)
        falls silent at a byte          Fault(hang_at=70_000, offsets_in_file=True)

    An ETag that changes between requests is a script: ``[None, Fault(etag='"other"')]``.
    """

    status: int | None = None
    """Answer with this status instead of the content."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers, or other values for usual ones."""
    body: bytes | None = None
    """Serve this instead of the content; with an ``etag``, that is another version."""
    wrong_bytes_at: tuple[int, ...] = ()
    """Bytes of the file to flip."""
    size: int | None = None
    """Pretend that the file is this long: cut, or filled up with zeros."""
    no_length: bool = False
    """Leave Content-Length away and close the connection at the end."""
    ignores_range: bool = False
    content_range: str | None = None
    """Send this Content-Range, whatever is in the body; empty for none."""
    shift_range: int = 0
    """Serve the range this many bytes further on, and say so."""
    max_range_bytes: int | None = None
    """Serve at most this many bytes of a range, and say so: RFC 9110 lets a server do that."""
    short_by: int = 0
    """Leave this many bytes away at the end: Content-Length tells the truth, Content-Range does not."""
    reset_at: int | None = None
    """Reset the connection after this many bytes of the body."""
    end_at: int | None = None
    """Close the connection in good order after this many bytes of the body."""
    hang_at: int | None = None
    """Send nothing more after this many bytes of the body; -1 for not even a status."""
    offsets_in_file: bool = False
    """``reset_at``, ``end_at`` and ``hang_at`` count from the start of the file: whichever range is asked for, that
    byte is the first one not to arrive, and ranges without it are served whole."""
    rate_bytes_per_second: float | None = None
    etag: str | None = None
    """Another validator; empty for none (and no date either)."""
    redirect_to: str | None = None
    is_gzipped: bool = False
    """Compress although nobody asked."""

    def cut(self, start: int, end: int) -> int | None:
        """Return after how many bytes of a body that holds the file's ``[start, end)`` it breaks off, if at all."""
        stops = [at for at in (self.reset_at, self.end_at, self.hang_at) if at is not None]
        if self.offsets_in_file:
            stops = [at - start for at in stops if start <= at < end]
        return min([end - start, *stops]) if stops else None


@dataclass(frozen=True)
class Content:
    """What lies at one path: bytes, or a file."""

    data: bytes | Path
    etag: str
    modified: str = _FIXED_DATE
    content_type: str = "application/octet-stream"

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size


@dataclass(frozen=True)
class SeenRequest:
    """What a client asked, in order of arrival."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""

    @property
    def range(self) -> str:
        """Return the ``Range`` header, or ''."""
        return self.headers.get("range", "")

    def wanted(self, size: int) -> tuple[int, int] | None:
        """Return which bytes of a file of ``size`` are asked for, half-open; None for all.

        A range beyond the end is returned as it is, its start not before its end.
        """
        match = _RANGE.fullmatch(self.range)
        if match is None:
            return None
        first, last = match[1], match[2]
        if not first:
            return max(0, size - int(last or 0)), size
        return int(first), min(size, int(last) + 1 if last else size)


@dataclass
class ServedRequest:
    """A request and what became of it; ``bytes_sent`` counts the body and grows while it is served."""

    request: SeenRequest
    status: int = 0
    bytes_sent: int = 0


@dataclass(frozen=True)
class Reply:
    """What to answer: a status with headers, and content for 200 and 206."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    content: Content | None = None
    body: bytes = b""
