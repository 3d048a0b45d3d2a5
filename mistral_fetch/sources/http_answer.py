"""Whether an answer to a (range) request is the one that was asked for. Pure: headers in, a span or an error out.

Owns RFC 9110's rules for ranges (14.4, 15.3.7, 15.5.17) as we need them. Knows nothing of sockets and disks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mistral_fetch.errors import MirrorError, NotAModelFile, RangeRefused, SizeMismatch
from mistral_fetch.spans import Span

_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,19})-([0-9]{1,19})|\*)/([0-9]{1,19}|\*)")
_HTML_PATH = re.compile(r"\.x?html?$", re.IGNORECASE)
_MAX_VALIDATOR = 200


@dataclass(frozen=True)
class Wanted:
    """What was asked: these bytes of a file of this size."""

    path: str
    size: int
    span: Span
    is_pinned: bool
    """A digest or piece hashes are known, so wrong bytes cannot stay unnoticed."""
    archive_offset: int = 0
    """Where the file begins within what lies at the address: more than 0 for a file inside an archive."""
    archive_size: int | None = None
    """The size of what lies at the address, where it is an archive."""

    @property
    def is_whole(self) -> bool:
        """Return whether no range needs to be asked for."""
        return self.span == Span(0, self.size) and self.archive_size is None

    @property
    def size_at_address(self) -> int:
        """Return the size that the server must know."""
        return self.size if self.archive_size is None else self.archive_size

    def range_header(self) -> str:
        """Return the ``Range`` value."""
        return f"bytes={self.archive_offset + self.span.start}-{self.archive_offset + self.span.end - 1}"


def body_span(wanted: Wanted, status: int, headers: Mapping[str, str], length: int | None, shown: str) -> Span:
    """Return which bytes of the file the body holds; those before the wanted ones are to be skipped.

    Args:
        wanted: What was asked.
        status: 200, 206 or 416; any other status is the caller's business.
        headers: The answer's headers, names in lower case.
        length: The announced length of the body, if any.
        shown: The mirror's address, fit to print.

    Raises:
        NotAModelFile: A web page instead of the file.
        SizeMismatch: The mirror's file is longer or shorter than promised.
        RangeRefused: The range is another one, or none.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if status != 416 and kind in {"text/html", "application/xhtml+xml"} and not _HTML_PATH.search(wanted.path):
        raise NotAModelFile(
            f"{shown} is a web page, not {wanted.path}",
            detail=f"expected {wanted.size} bytes of a model file, got {kind}",
            hint="open the address in a browser: a login or an error page is likely; or use another mirror",
        )
    if status == 200:
        if length not in {None, wanted.size_at_address}:
            raise wrong_size(wanted, f"{length} bytes announced", shown)
        if wanted.archive_size is not None:
            raise _refused(wanted, "all of the archive", shown)
        return Span(0, wanted.size)
    span = _ranged_span(wanted, status, headers, length, shown)
    if length not in {None, span.length}:
        raise _refused(wanted, f"{length} bytes for {headers.get('content-range', '')[:80]!r}", shown)
    return span


def _ranged_span(wanted: Wanted, status: int, headers: Mapping[str, str], length: int | None, shown: str) -> Span:
    value = " ".join(headers.get("content-range", "").split())
    if status == 206 and not value and length == wanted.span.length and wanted.is_pinned:
        # Some mirrors (hf-mirror.com among them) leave Content-Range away. An answer of exactly the length
        # asked for is believed where a digest will tell.
        return wanted.span
    match = _CONTENT_RANGE.fullmatch(value)
    if match is None:
        raise _refused(wanted, f"Content-Range {value[:80]!r}", shown)
    if match[3] != "*" and int(match[3]) != wanted.size_at_address:
        raise wrong_size(wanted, f"a file of {match[3]} bytes", shown)
    if status == 416 or match[1] is None:
        raise _refused(wanted, f"status {status} with {value!r}", shown)
    first, last = int(match[1]) - wanted.archive_offset, int(match[2]) - wanted.archive_offset
    if first != wanted.span.start or not first <= last < wanted.span.end:
        raise _refused(wanted, f"Content-Range {value!r}", shown)
    return Span(first, last + 1)


def strong_validator(headers: Mapping[str, str], *, is_pinned: bool) -> str:
    """Return what names this version of the file for ``If-Range`` (RFC 9110, 13.1.5), or ''.

    A date counts only where nothing better is known: it cannot tell two changes within a second apart.
    """
    etag = headers.get("etag", "").strip()
    if re.fullmatch(r'"[^"\s]*"', etag) and len(etag) <= _MAX_VALIDATOR and etag.isascii():
        return etag
    modified = headers.get("last-modified", "").strip()
    return modified if not is_pinned and modified.isascii() and len(modified) <= _MAX_VALIDATOR else ""


def wrong_size(wanted: Wanted, actual: str, shown: str) -> SizeMismatch:
    """Return the error for a mirror whose file is longer or shorter than promised."""
    return SizeMismatch(
        f"{shown} has another {wanted.path}",
        detail=f"expected {wanted.size_at_address} bytes, got {actual}",
        hint="use another mirror; the manifest says what is right",
    )


def _refused(wanted: Wanted, actual: str, shown: str) -> MirrorError:
    return RangeRefused(
        f"{shown} answered with another range of {wanted.path}",
        detail=f"expected bytes {wanted.span.start}-{wanted.span.end - 1}/{wanted.size}, got {actual}",
        hint="use another mirror; this one cannot resume",
    )
