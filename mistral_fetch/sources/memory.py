"""A source over a dict: for tests, examples and your own trials. It passes the same suite as the real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import PieceMismatch, SizeMismatch
from mistral_fetch.events import BytesReceived, Progress, Report, SourceConnected
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.failover import give_up, known_size, report_lie


class MemorySource:
    """Serves files from memory.

    Args:
        files: Content by path.
        label: The name to go by.
    """

    assurance = Assurance.SIZE

    def __init__(self, files: Mapping[str, bytes], label: str = "memory") -> None:
        self.files = dict(files)
        self.label = label

    def fetch(self, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        """Fill every target's partial.

        Raises:
            AllSourcesFailed: There is no such file here.
            SizeMismatch, PieceMismatch: It is another file.
            StoreError, Interrupted: See :class:`~mistral_fetch.sources.base.Source`.
        """
        report(SourceConnected(self.label))
        for target in targets:
            size = known_size(target.entry)
            content = self.files.get(target.entry.path)
            if content is None:
                raise give_up(target.entry, [], "source in memory")
            if len(content) != size:
                raise SizeMismatch(
                    f"{self.label} has another {target.entry.path}",
                    detail=f"expected {size} bytes, got {len(content)}",
                    hint="use another source",
                )
            self._fill(target, memoryview(content), report, stop)

    def _fill(self, target: Target, content: memoryview, report: Report, stop: StopSignal) -> None:
        partial, path = target.partial, target.entry.path
        partial.prepare()
        try:
            while missing := partial.missing_pieces():
                for index in missing:
                    stop.check()
                    span = partial.grid.span(index)
                    self._put(target, index, content[span.start : span.end], report)
                    report(BytesReceived(self.label, path, span.length))
                    report(Progress(path, partial.present_bytes))
                partial.flush()
        finally:
            partial.flush()

    def _put(self, target: Target, index: int, data: memoryview, report: Report) -> None:
        try:
            target.partial.put(index, data, self.label)
        except PieceMismatch:
            report_lie(target, index, data, self.label, report)
            raise
