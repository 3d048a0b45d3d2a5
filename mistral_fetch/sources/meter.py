"""Counting what was received, in few events."""

from __future__ import annotations

import time

from mistral_fetch.events import BytesReceived, Report
from mistral_fetch.units import KIB, MIB

# Fewer bytes than this do not count as progress, or a mirror that sends one byte and hangs up is asked for ever.
PROGRESS_BYTES = 64 * KIB
_REPORT_BYTES = 4 * MIB
_REPORT_SECONDS = 0.1
_WINDOW_SECONDS = 0.5


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


class Arrival:
    """How fast bytes arrive, all connections together: over the last half second or so."""

    def __init__(self, now_seconds: float) -> None:
        self.bytes_per_second = 0.0
        self.heard_seconds = now_seconds
        """When the last byte came, or counting began."""
        self._began, self._bytes = now_seconds, 0

    def count(self, length: int, now_seconds: float) -> None:
        """Count bytes."""
        self._bytes += length
        self.heard_seconds = now_seconds

    def observe(self, now_seconds: float) -> None:
        """Compute the rate anew, if the last time is long enough ago."""
        elapsed = now_seconds - self._began
        if elapsed >= _WINDOW_SECONDS:
            self.bytes_per_second = self._bytes / elapsed
            self._began, self._bytes = now_seconds, 0
