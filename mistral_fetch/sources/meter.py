"""Counting what was received, in few events."""

from __future__ import annotations

import time

from mistral_fetch.events import BytesReceived, Report
from mistral_fetch.units import KIB, MIB

# Fewer bytes than this do not count as progress, or a mirror that sends one byte and hangs up is asked for ever.
PROGRESS_BYTES = 64 * KIB
_REPORT_BYTES = 4 * MIB
_REPORT_SECONDS = 0.1


class ReceivedMeter:
    """Sums up received bytes into few events."""

    def __init__(self, source: str, path: str, report: Report) -> None:
        self._source, self._path, self._report = source, path, report
        self._waiting = 0
        self._last = time.monotonic()

    def count(self, length: int) -> None:
        """Count bytes; report them when there are many or the last report is a while ago."""
        self._waiting += length
        if self._waiting >= _REPORT_BYTES or time.monotonic() - self._last >= _REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Report what was counted."""
        if self._waiting:
            self._report(BytesReceived(self._source, self._path, self._waiting))
        self._waiting = 0
        self._last = time.monotonic()
