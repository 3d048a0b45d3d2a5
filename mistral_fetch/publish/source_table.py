"""What each source has done so far: bytes, the rate of the last seconds, and what went wrong."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from mistral_fetch.publish.piece_map import source_name

WINDOW_SECONDS = 5.0
_LEAST_SECONDS = 0.5
_BUCKET_SECONDS = 0.25


@dataclass
class _Source:
    received_bytes: int = 0
    failures: int = 0
    lies: int = 0
    problem: str = ""
    is_given_up: bool = False
    recent: deque[tuple[float, int]] = field(default_factory=deque)


class SourceTable:
    """Numbers by source, oldest first. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}

    def connected(self, label: str) -> None:
        """Note that a source answered."""
        self._source(label).is_given_up = False

    def received(self, label: str, length: int, now: float) -> None:
        """Count bytes."""
        source = self._source(label)
        source.received_bytes += length
        if source.recent and now - source.recent[-1][0] < _BUCKET_SECONDS:
            began, before = source.recent.pop()
            source.recent.append((began, before + length))
        else:
            source.recent.append((now, length))
        while source.recent[0][0] < now - WINDOW_SECONDS:
            source.recent.popleft()

    def failed(self, label: str, reason: str, *, will_retry: bool) -> None:
        """Note a failure, and whether it was the last."""
        source = self._source(label)
        source.failures += 1
        source.problem, source.is_given_up = reason, not will_retry

    def lied(self, label: str, where: str) -> None:
        """Note wrong bytes."""
        source = self._source(label)
        source.lies += 1
        source.problem, source.is_given_up = f"sent wrong bytes: {where}", True

    def rows(self, now: float) -> list[dict[str, Any]]:
        """Return a row for each source."""
        return [
            {
                "name": name,
                "received_bytes": source.received_bytes,
                "rate_bytes_per_second": _rate(source, now),
                "failures": source.failures,
                "lies": source.lies,
                "problem": source.problem,
                "given_up": source.is_given_up,
            }
            for name, source in self._sources.items()
        ]

    def _source(self, label: str) -> _Source:
        return self._sources.setdefault(source_name(label), _Source())


def _rate(source: _Source, now: float) -> int:
    recent = [(began, length) for began, length in source.recent if began >= now - WINDOW_SECONDS]
    if not recent:
        return 0
    return int(sum(length for _, length in recent) / max(_LEAST_SECONDS, now - recent[0][0]))
