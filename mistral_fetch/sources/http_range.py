"""One connection's work: ask a mirror for a run of pieces, check the answer, and read the pieces one by one.

A piece cut off by a broken connection keeps what came: the next answer continues within it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from mistral_fetch.errors import MirrorUnreachable, RangeRefused, SizeMismatch
from mistral_fetch.events import Event, SourceConnected
from mistral_fetch.manifest import MirrorUrl
from mistral_fetch.sources.base import Target
from mistral_fetch.sources.http_answer import Wanted, body_span, wrong_size
from mistral_fetch.sources.http_client import Answer, HttpClient, status_error
from mistral_fetch.sources.meter import PROGRESS_BYTES, ReceivedMeter
from mistral_fetch.sources.mirror_state import MirrorState
from mistral_fetch.sources.schedule import Run
from mistral_fetch.sources.tar_index import TarIndex
from mistral_fetch.sources.urls import redact
from mistral_fetch.spans import Span


class Fetcher(Protocol):
    """What a request tells whoever made it."""

    @property
    def chunk_bytes(self) -> int | None:
        """Return how much to read at once."""

    def report(self, event: Event) -> None:
        """Take an event."""

    def is_wanted(self, run: Run) -> bool:
        """Return whether anything is still to be done for the run."""

    def received(self, run: Run, length: int) -> bool:
        """Count bytes; return whether the run is still wanted."""

    def piece_is_whole(self, run: Run, index: int, data: memoryview, seconds: float) -> None:
        """Verify and keep a piece."""


class RangeRequest:
    """Asks for one run, as often as it takes.

    Args:
        client: The door to the web.
        archives: Where files lie inside archives.
        target: The file.
        address: Where the mirror has it.
        mirror: Who is asked.
        run: Which pieces.
        buffer: Room for one piece.
    """

    def __init__(
        self,
        client: HttpClient,
        archives: TarIndex,
        target: Target,
        address: MirrorUrl,
        mirror: MirrorState,
        run: Run,
        buffer: memoryview,
    ) -> None:
        self._client, self._target, self._address, self._mirror, self._run = client, target, address, mirror, run
        self._archives = archives
        self._shown = redact(address.url)
        self._buffer = buffer
        self._answer: Answer | None = None
        self._forgiven = 0
        self.filled = 0
        """How many bytes of the piece being fetched are in the buffer."""
        self.is_useless = False
        """Asking this mirror for this file again cannot help."""

    @property
    def buffered(self) -> memoryview:
        """Return what came of the piece being fetched."""
        return self._buffer[: self.filled]

    def has_advanced(self) -> bool:
        """Return whether enough came since this was asked last that earlier failures are forgiven."""
        has_advanced = self._run.received_bytes - self._forgiven >= PROGRESS_BYTES
        self._forgiven = self._run.received_bytes
        return has_advanced

    @property
    def has_answer(self) -> bool:
        """Return whether an answer is being read; before that, nothing was taken and nobody need wait."""
        return self._answer is not None

    def abort(self) -> None:
        """Break the connection off, from any thread, if there is an answer."""
        answer = self._answer
        if answer is not None:
            answer.body.abort()

    def ask(self, fetcher: Fetcher) -> None:
        """Make one request for what is missing of the run, and take what comes.

        Raises:
            MirrorError, IntegrityError, AccessError: This mirror does not deliver.
            StoreError: The disk refused.
        """
        # Read once: whoever wins a race for the last piece moves this run on from another thread.
        first, end = self._run.next, self._run.end
        if first >= end:
            return
        wanted = self._wanted(first, end)
        headers = {} if wanted.is_whole else {"Range": wanted.range_header(), **self._condition()}
        meter = ReceivedMeter(self._mirror.host, self._target.entry.path, fetcher.report)
        try:
            with self._client.stream(self._address.url, headers) as answer:
                self._answer = answer
                if not fetcher.is_wanted(self._run):
                    return
                body = self._check(wanted, answer)
                if not self._mirror.is_connected:
                    self._mirror.is_connected = True
                    fetcher.report(SourceConnected(self._mirror.host))
                self._receive(wanted, first, body, answer, fetcher, meter.count)
        finally:
            self._answer = None
            meter.flush()

    def _wanted(self, first: int, end: int) -> Wanted:
        grid = self._target.partial.grid
        span = Span(grid.span(first).start + self.filled, grid.span(end - 1).end)
        path, url, member = self._target.entry.path, self._address.url, self._address.member
        if not member:
            return Wanted(path, grid.size, span, is_pinned=True)
        found = self._archives.locate(url, member)
        whole_size = self._archives.whole_size(url)
        wanted = Wanted(path, grid.size, span, is_pinned=False, archive_offset=found.offset, archive_size=whole_size)
        if found.size != grid.size:
            raise SizeMismatch(
                f"{self._shown} has another {member}",
                detail=f"expected {grid.size} bytes, got {found.size}",
                hint="use another mirror; the manifest says what is right",
            )
        return wanted

    def _condition(self) -> Mapping[str, str]:
        """Hold a file of an archive to the version whose headers were read (RFC 9110, 13.1.5)."""
        validator = self._archives.validator(self._address.url) if self._address.member else ""
        return {"If-Range": validator} if validator else {}

    def _check(self, wanted: Wanted, answer: Answer) -> Span:
        if answer.status not in {200, 206, 416} or (answer.status != 200 and wanted.is_whole):
            raise status_error(answer)
        body = body_span(wanted, answer.status, answer.headers, answer.content_length, self._shown)
        if answer.status == 200 and not wanted.is_whole:
            raise RangeRefused(
                f"{self._shown} sends the whole file when a part is asked for",
                detail=f"expected {wanted.range_header()}, got all of it",
                hint="it is used only where no other mirror is left",
                sends_all=True,
            )
        return body

    def _receive(
        self, wanted: Wanted, index: int, body: Span, answer: Answer, fetcher: Fetcher, count: Callable[[int], None]
    ) -> None:
        grid, run = self._target.partial.grid, self._run
        position, began = body.start, time.monotonic()
        most = fetcher.chunk_bytes or len(self._buffer)
        is_wanted = True
        while is_wanted and position < body.end:
            # Not the run's next one: a race that is lost meanwhile would give these bytes another piece's number.
            piece = grid.span(index)
            room = min(piece.length - self.filled, body.end - position, most)
            length = answer.read_into(self._buffer[self.filled : self.filled + room])
            if length == 0:
                break
            count(length)
            self.filled += length
            position += length
            is_wanted = fetcher.received(run, length)
            if self.filled == piece.length:
                if position == wanted.size and answer.content_length is None:
                    self._refuse_surplus(wanted, answer)
                now = time.monotonic()
                fetcher.piece_is_whole(run, index, self.buffered, now - began)
                self.filled, began, index = 0, now, index + 1
                is_wanted = is_wanted and run.next < run.end
        if is_wanted and position < body.end:
            raise self._ended_early(wanted, position)

    def _refuse_surplus(self, wanted: Wanted, answer: Answer) -> None:
        if answer.read_into(memoryview(bytearray(1))):
            raise wrong_size(wanted, "more", self._shown)

    def _ended_early(self, wanted: Wanted, position: int) -> MirrorUnreachable:
        return MirrorUnreachable(
            f"{self._shown} ended its answer early",
            detail=f"expected bytes up to {wanted.span.end}, got them up to {position}",
            hint="run the same command again to go on",
        )
