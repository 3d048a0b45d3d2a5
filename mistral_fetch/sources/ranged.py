"""A few small parts of one large remote file, all of them from one version of it.

Owns the rules for that: the first answer tells size and version, and every later one has to agree. Whole files and
resuming are :mod:`.http`'s business.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass

from mistral_fetch.errors import ContentChanged, MirrorError, NotAModelFile, RangeRefused
from mistral_fetch.manifest import MAX_FILE_SIZE
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.http_answer import strong_validator
from mistral_fetch.sources.http_client import Answer, HttpClient, breaking_off, status_error
from mistral_fetch.sources.mirror_errors import broken, too_slow
from mistral_fetch.sources.retry import retrying
from mistral_fetch.sources.urls import redact
from mistral_fetch.spans import Span
from mistral_fetch.units import KIB

_FIRST_BYTES = 64 * KIB
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


@dataclass(frozen=True)
class _Version:
    size: int
    validator: str


class RangedFile:
    """Reads ranges of one address, from any thread.

    Args:
        client: The door to the web; its settings say how patient to be.
        url: The address.
        stop: Asked between reads.
    """

    def __init__(self, client: HttpClient, url: str, stop: StopSignal) -> None:
        self._client = client
        self._url = url
        self._shown = redact(url)
        self._stop = stop
        self._lock = threading.Lock()
        self._version: _Version | None = None
        self._beginning = b""

    def size(self) -> int:
        """Return the bytes of the whole file, asked for once.

        Raises:
            RangeRefused, NotAModelFile, MirrorError, AccessError, OfflineRefused, Interrupted: See :meth:`read`.
        """
        with self._lock:
            if self._version is None:
                self._beginning = self._ask(Span(0, _FIRST_BYTES))
            assert self._version is not None, "an accepted answer tells the version"
            return self._version.size

    def validator(self) -> str:
        """Return what the server calls the version that is read (a strong ETag or a date), or ''.

        Raises:
            RangeRefused, NotAModelFile, MirrorError, AccessError, OfflineRefused, Interrupted: See :meth:`read`.
        """
        self.size()
        return self._version.validator if self._version else ""

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer only at the file's end.

        Raises:
            RangeRefused: The server does not serve ranges, or another one.
            NotAModelFile: It has something else, such as a login page.
            ContentChanged: Another version of the file than before.
            MirrorError, AccessError, OfflineRefused: It cannot be asked.
            Interrupted: ``stop`` was set.
        """
        wanted = Span(offset, min(offset + length, self.size()))
        if wanted.end <= len(self._beginning):
            return self._beginning[offset : wanted.end]
        return self._ask(wanted)

    def _ask(self, wanted: Span) -> bytes:
        def ask() -> bytes:
            deadline = time.monotonic() + self._client.settings.metadata_timeout_seconds
            headers = {"Range": f"bytes={wanted.start}-{wanted.end - 1}"}
            with breaking_off(self._client, self._stop), self._client.stream(self._url, headers) as answer:
                return self._body(answer, self._accept(answer, wanted), deadline)

        return retrying(ask, self._client.settings.retry, self._stop, self._client.settings.read_timeout_seconds)

    def _accept(self, answer: Answer, wanted: Span) -> Span:
        """Return which bytes the body holds: the wanted ones, or fewer where the file ends before."""
        if answer.status not in {200, 206, 416}:
            raise status_error(answer)
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in {"text/html", "application/xhtml+xml"}:
            raise NotAModelFile(
                f"{self._shown} is a web page, not an archive",
                detail=f"expected an uncompressed tar, got {kind}",
                hint="open the address in a browser: a login or an error page is likely; or use another mirror",
            )
        match = _CONTENT_RANGE.fullmatch(" ".join(answer.headers.get("content-range", "").split()))
        if answer.status != 206 or match is None:
            raise self._refused(wanted, f"status {answer.status} and {answer.headers.get('content-range', '')[:80]!r}")
        first, last, size = (int(number) for number in match.groups())
        if size > MAX_FILE_SIZE or (first, last + 1) != (wanted.start, min(wanted.end, size)):
            raise self._refused(wanted, f"Content-Range {match[0]!r}")
        self._check_version(_Version(size, strong_validator(answer.headers, is_pinned=False)))
        return Span(first, last + 1)

    def _check_version(self, now: _Version) -> None:
        before = self._version
        if before is None:
            self._version = now
        elif now != before:
            error = ContentChanged(
                f"{self._shown} changed while it was read",
                detail=f"expected {before.size} bytes of version {before.validator or 'unknown'}, "
                f"got {now.size} of {now.validator or 'unknown'}",
                hint="run the same command again once the publisher has finished",
            )
            error.is_permanent = True  # the bytes read so far belong to a version that is gone
            raise error

    def _body(self, answer: Answer, span: Span, deadline: float) -> bytes:
        body = bytearray()
        for chunk in answer.chunks():
            self._stop.check()
            if time.monotonic() >= deadline:
                raise too_slow(self._url, self._client.settings.metadata_timeout_seconds)
            body += chunk
            if len(body) > span.length:
                raise self._refused(span, "more than it announced")
        if len(body) < span.length:
            raise broken(self._shown, f"{len(body)} of {span.length} bytes")
        return bytes(body)

    def _refused(self, wanted: Span, actual: str) -> MirrorError:
        return RangeRefused(
            f"{self._shown} does not serve the range that was asked for",
            detail=f"expected status 206 with bytes {wanted.start}-{wanted.end - 1}, got {actual}",
            hint="use another mirror or channel; a file inside an archive needs ranges",
        )
