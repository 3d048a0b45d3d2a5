"""What a transfer looks like so far, computed from its events. Pure: the clock is handed in, nothing is drawn."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from mistral_fetch.events import (
    BytesReceived,
    BytesVerified,
    Event,
    FileVerified,
    Progress,
    SourceConnected,
    TransferPlanned,
)
from mistral_fetch.units import format_duration, format_rate, format_size

# Rates are averaged over this window: long enough to be calm, short enough to follow a change.
RATE_WINDOW_SECONDS = 10.0
# The time left is told from a rate that follows more slowly, or it would jump with every cloud on the line.
STEADY_SECONDS = 30.0
# How long before the first bytes are counted (or the first after a pause) they are taken to have been on their way.
LEAD_SECONDS = 1.0


@dataclass
class Pace:
    """How fast bytes come: of late, and steadily."""

    _began: float | None = None
    """When bytes began to come, after the start or after a pause that filled the window."""
    _recent: deque[tuple[float, int]] = field(default_factory=deque)
    _steady: float = 0.0
    _told: float = 0.0
    """Up to when ``_steady`` is the mean."""

    def begin(self, now_seconds: float) -> None:
        """Take note that bytes may come from now on."""
        self._began = self._told = now_seconds
        self._steady = 0.0
        self._recent.clear()

    def add(self, length: int, now_seconds: float) -> None:
        """Count bytes."""
        self._forget(now_seconds)
        if self._began is None or not self._recent:
            earliest = now_seconds - LEAD_SECONDS
            self.begin(earliest if self._began is None else max(self._began, earliest))
        self._steady = self._steady_with(length, now_seconds)
        self._told = now_seconds
        self._recent.append((now_seconds, length))

    def recent(self, now_seconds: float) -> float:
        """Return the bytes per second of late; 0 when none came."""
        self._forget(now_seconds)
        if self._began is None or not self._recent:
            return 0.0
        elapsed = min(max(now_seconds - self._began, 0.1), RATE_WINDOW_SECONDS)
        return sum(length for _, length in self._recent) / elapsed

    def steady(self, now_seconds: float) -> float:
        """Return the bytes per second that may be counted on; 0 when none came of late."""
        return self._steady_with(0, now_seconds) if self.recent(now_seconds) else 0.0

    def _steady_with(self, length: int, now_seconds: float) -> float:
        """Return the mean since the beginning, in which what is long past counts less and less."""
        age = min(max(now_seconds - (self._began or 0.0), 0.1), STEADY_SECONDS)
        weight = min(max(now_seconds - self._told, 0.0) / age, 1.0)
        return self._steady * (1 - weight) + length / age

    def _forget(self, now_seconds: float) -> None:
        while self._recent and self._recent[0][0] < now_seconds - RATE_WINDOW_SECONDS:
            self._recent.popleft()


@dataclass
class TransferView:
    """The numbers a bar shows. Shown bytes never go backwards, even when bytes have to be fetched again."""

    label: str = ""
    total_bytes: int = 0
    shown_bytes: int = 0
    verifying: str = ""
    verified_bytes: int = 0
    verify_total: int = 0
    received_by_source: dict[str, int] = field(default_factory=dict)
    peers: int = 0
    _present: dict[str, int] = field(default_factory=dict)
    _pace: Pace = field(default_factory=Pace)

    def apply(self, event: Event, now_seconds: float) -> None:
        """Take one event in."""
        if isinstance(event, TransferPlanned):
            self.label, self.total_bytes = event.label, event.total_bytes
            self.shown_bytes, self._present = event.present_bytes, {}
            self._pace.begin(now_seconds)
        elif isinstance(event, Progress):
            self.verifying = ""
            self._present[event.path] = event.present_bytes + event.flying_bytes
        elif isinstance(event, BytesReceived):
            known = self.received_by_source.get(event.source, 0)
            self.received_by_source[event.source] = known + event.length
            self._pace.add(event.length, now_seconds)
            self.verifying = ""
        elif isinstance(event, BytesVerified):
            self.verifying, self.verified_bytes, self.verify_total = event.path, event.verified_bytes, event.total_bytes
        elif isinstance(event, FileVerified):
            self.verifying = ""
        elif isinstance(event, SourceConnected):
            self.peers = max(self.peers, event.peers)
        # Not what was received: a mirror that cannot resume sends again what is here already.
        self.shown_bytes = min(max(self.shown_bytes, sum(self._present.values())), self.total_bytes)

    def rate(self, now_seconds: float) -> float:
        """Return the recent rate in bytes per second."""
        return self._pace.recent(now_seconds)

    def fraction(self) -> float:
        """Return how much is done, 0 to 1."""
        return self.shown_bytes / self.total_bytes if self.total_bytes else 1.0

    def eta(self, now_seconds: float) -> str:
        """Return the time left as text, or '' when nothing moves or less than a second is left."""
        rate = self._pace.steady(now_seconds)
        seconds = (self.total_bytes - self.shown_bytes) / rate if rate > 0 else 0.0
        return format_duration(seconds) if seconds >= 1 else ""

    def split(self) -> str:
        """Return how the received bytes split by source, such as ``mirror.example 60 %, swarm 40 %``."""
        total = sum(self.received_by_source.values())
        if not total:
            return ""
        ordered = sorted(self.received_by_source.items(), key=lambda item: -item[1])
        if len(ordered) == 1:
            return ordered[0][0]
        return ", ".join(f"{source} {length * 100 / total:.0f} %" for source, length in ordered)

    def numbers(self, now_seconds: float) -> list[str]:
        """Return what stands beside a bar, the most important first: bytes, rate, time left, sources."""
        rate, eta, split = self.rate(now_seconds), self.eta(now_seconds), self.split()
        parts = [
            f"{format_size(self.shown_bytes)} of {format_size(self.total_bytes)}",
            format_rate(rate) if rate else "",
            f"{eta} left" if eta else "",
            f"from {split}" if split else "",
        ]
        return [part for part in parts if part]

    def line(self, now_seconds: float) -> str:
        """Return the state as one line of plain text."""
        return ", ".join([f"{self.label}: {int(self.fraction() * 100)} %", *self.numbers(now_seconds)])

    def verifying_line(self) -> str:
        """Return how far the whole-file check is, as one line of plain text."""
        return f"verifying {self.verifying}: {self.verified_bytes * 100 // max(self.verify_total, 1)} %"
