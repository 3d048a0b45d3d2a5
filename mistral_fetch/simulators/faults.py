"""What the simulated mirror is told and what it tells: faults, contents, requests and replies. Values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_FIXED_DATE = "Wed, 27 Sep 2023 05:30:00 GMT"


@dataclass(frozen=True)
class Fault:
    """One way to misbehave; fields combine. Offsets count from the start of the file unless said otherwise."""

    status: int | None = None
    """Answer with this status instead of the content."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers, or other values for usual ones."""
    body: bytes | None = None
    """Send this instead of the content."""
    wrong_bytes_at: tuple[int, ...] = ()
    """Bytes to flip."""
    size: int | None = None
    """Pretend that the file is this long: cut, or filled up with zeros."""
    no_length: bool = False
    """Leave Content-Length away and close the connection at the end."""
    ignores_range: bool = False
    content_range: str | None = None
    """Send this Content-Range, whatever is in the body; empty for none."""
    shift_range: int = 0
    """Serve the range this many bytes further on, and say so."""
    reset_at: int | None = None
    """Reset the connection after this many bytes of the body."""
    end_at: int | None = None
    """Close the connection in good order after this many bytes of the body."""
    hang_at: int | None = None
    """Send nothing more after this many bytes of the body; -1 for not even a status."""
    rate_bytes_per_second: float | None = None
    etag: str | None = None
    """Another validator; empty for none (and no date either)."""
    redirect_to: str | None = None
    is_gzipped: bool = False
    """Compress although nobody asked."""


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
