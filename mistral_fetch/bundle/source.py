"""A bundle as a source: it fills partials, piece by piece, each verified before it is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from mistral_fetch.bundle.contents import Content
from mistral_fetch.bundle.reader import BundleReader
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import PieceMismatch
from mistral_fetch.events import BytesReceived, Progress, Report, SourceConnected
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.failover import report_lie

LABEL = "bundle"
# One piece is read, two are on their way to the disk: while one waits for a sync, the other does not.
BUFFERS = 3


class BundleSource:
    """Takes the pieces that are missing; of a file, only those are read.

    Args:
        reader: The bundle.
        is_last: Nothing else of the bundle is wanted, so that its end is checked before a file is published.
    """

    assurance = Assurance.SIZE
    label = LABEL

    def __init__(self, reader: BundleReader, *, is_last: bool) -> None:
        self._reader = reader
        self._is_last = is_last

    def fetch(self, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        """Fill every target's partial, in the bundle's own order.

        Raises:
            PieceMismatch: A piece was changed on the way; nothing of it was written.
            MalformedBundle: Something else stands where a file must be.
            SizeMismatch: The bundle is cut short.
            IntegrityError: It cannot be read, or not again.
            StoreError, Interrupted: See :class:`~mistral_fetch.sources.base.Source`.
        """
        report(SourceConnected(self.label))
        by_sha256 = self._reader.plan.by_sha256
        found = [(by_sha256[target.entry.sha256 or ""], target) for target in targets]
        for content, target in sorted(found, key=lambda pair: pair[0].offset):
            try:
                self._fill(content, target, report, stop)
            finally:
                target.partial.flush()
        if self._is_last:
            self._reader.finish()

    def _fill(self, content: Content, target: Target, report: Report, stop: StopSignal) -> None:
        partial, path = target.partial, target.entry.path
        partial.prepare()
        if partial.missing_pieces():
            self._reader.go_to(content)
        while missing := partial.missing_pieces():
            for length in self._take(missing, content, target, report, stop):
                report(BytesReceived(self.label, path, length))
                report(Progress(path, partial.present_bytes))
            partial.flush()
        report(Progress(path, partial.present_bytes))

    def _take(
        self, missing: Sequence[int], content: Content, target: Target, report: Report, stop: StopSignal
    ) -> Iterator[int]:
        """Read pieces in their order while those before are hashed, written and synced; yield their lengths."""
        grid = target.partial.grid
        free = [memoryview(bytearray(min(grid.piece_length, grid.size))) for _ in range(BUFFERS)]
        busy: deque[tuple[Future[None], memoryview]] = deque()
        with ThreadPoolExecutor(BUFFERS - 1) as pool:
            for index in missing:
                stop.check()
                if not free:
                    free.append(_finished(*busy.popleft()))
                buffer, span = free.pop(), grid.span(index)
                piece = buffer[: span.length]
                self._reader.source.read_into(content.offset + span.start, piece)
                busy.append((pool.submit(self._put, target, index, piece, report), buffer))
                yield span.length
            while busy:
                _finished(*busy.popleft())

    def _put(self, target: Target, index: int, piece: memoryview, report: Report) -> None:
        try:
            target.partial.put(index, piece, self.label)
        except PieceMismatch as error:
            report_lie(target, index, piece, self.label, report)
            raise PieceMismatch(
                f"{target.entry.path} in {self._reader.label}: {error.what.replace(' from bundle', '')}",
                detail=error.detail,
                hint="copy the bundle again; what was verified is kept",
            ) from error


def _finished(work: Future[None], buffer: memoryview) -> memoryview:
    work.result()
    return buffer
