"""Numbers about a transfer or a service, kept from its events, for whoever watches a fleet.

Fed like any other report; read by :mod:`mistral_fetch.publish.status`. Thread-safe, no I/O.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mistral_fetch.events import (
    BytesDropped,
    BytesReceived,
    Event,
    FilesOpened,
    FileVerified,
    Progress,
    SnapshotReady,
    SourceConnected,
    SourceFailed,
    SourceLied,
    TransferPlanned,
)
from mistral_fetch.publish.piece_map import PieceMap
from mistral_fetch.publish.source_table import SourceTable


@dataclass
class Metrics:
    """What is known so far.

    Args:
        doing: The work in one word: pull, seed or mirror.
        clock: Monotonic seconds.
    """

    doing: str
    clock: Callable[[], float] = time.monotonic
    model: str = ""
    total_bytes: int = 0
    present_bytes: int = 0
    peers: int = 0
    is_ready: bool = False
    seconds_to_ready: float | None = None
    received: Counter[str] = field(default_factory=Counter)
    """Bytes by kind of source: http, torrent or local."""
    uploaded: Counter[str] = field(default_factory=Counter)
    """Bytes given away: by http or by torrent."""
    failures: Counter[str] = field(default_factory=Counter)
    """Bytes that were not what was promised, by what was found out: lie, piece or file."""
    requests: Counter[str] = field(default_factory=Counter)
    """Answers of a mirror by status."""
    sources: SourceTable = field(default_factory=SourceTable)
    pieces: PieceMap = field(default_factory=PieceMap)
    file_count: int = 0
    files_verified: int = 0
    _flying: dict[str, int] = field(default_factory=dict)
    _present: dict[str, int] = field(default_factory=dict)
    _planned_present: int = 0
    _began: float = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._began = self.clock()

    def __call__(self, event: Event) -> None:
        """Take one event in."""
        if isinstance(event, FilesOpened):
            self.pieces.open(event.views)
        elif isinstance(event, FileVerified):
            self.pieces.verified(event.path)
        with self._lock:
            self._apply(event)

    def set_ready(self, is_ready: bool) -> None:
        """Note whether the work is done, or the service can be used; the first time is the time to ready."""
        with self._lock:
            self._set_ready(is_ready)

    def offer(self, model: str, total_bytes: int, present_bytes: int) -> None:
        """Note what a service offers, and how much of it is right."""
        with self._lock:
            self.model, self.total_bytes, self.present_bytes = model, total_bytes, present_bytes

    def set_swarm(self, uploaded_bytes: int, peers: int) -> None:
        """Note a swarm's fresh totals."""
        with self._lock:
            self.uploaded["torrent"], self.peers = uploaded_bytes, peers

    def add_answer(self, status: int) -> None:
        """Count one answer of a mirror."""
        with self._lock:
            self.requests[str(status)] += 1

    def add_sent(self, body_bytes: int) -> None:
        """Count bytes of a mirror's answers."""
        with self._lock:
            self.uploaded["http"] += body_bytes

    def add_failure(self, kind: str, count: int = 1) -> None:
        """Count bytes that turned out wrong."""
        with self._lock:
            self.failures[kind] += count

    def snapshot(self) -> dict[str, Any]:
        """Return everything as plain values, taken at one moment."""
        with self._lock:
            return {
                "doing": self.doing,
                "model": self.model,
                "ready": self.is_ready,
                "seconds": round(self.clock() - self._began, 3),
                "seconds_to_ready": self.seconds_to_ready,
                "total_bytes": self.total_bytes,
                "present_bytes": self.present_bytes,
                "received_bytes": dict(self.received),
                "uploaded_bytes": dict(self.uploaded),
                "verify_failures": dict(self.failures),
                "http_answers": dict(self.requests),
                "peers": self.peers,
            }

    def picture(self) -> dict[str, Any]:
        """Return what :meth:`snapshot` does, and what a picture of it needs: sources, pieces, what is left."""
        with self._lock:
            now = self.clock()
            sources = self.sources.rows(now)
            rate = sum(source["rate_bytes_per_second"] for source in sources)
            left = self.total_bytes - self.present_bytes
            more = {
                "rate_bytes_per_second": rate,
                "seconds_left": round(left / rate) if rate and left else None,
                "flying_bytes": sum(self._flying.values()),
                "files": self.file_count,
                "files_verified": self.files_verified,
                "sources": sources,
            }
        return self.snapshot() | more | {"map": self.pieces.told()}

    def _apply(self, event: Event) -> None:
        if isinstance(event, BytesReceived):
            self.received[_kind_of(event.source)] += event.length
            self.sources.received(event.source, event.length, self.clock())
        elif isinstance(event, FileVerified):
            self.files_verified += 1
        elif isinstance(event, SourceFailed):
            self.sources.failed(event.source, event.reason, will_retry=event.will_retry)
        elif isinstance(event, Progress):
            self._flying[event.path] = event.flying_bytes
            self._present[event.path] = event.present_bytes
            self.present_bytes = max(self._planned_present, sum(self._present.values()))
        elif isinstance(event, TransferPlanned):
            self.model, self.total_bytes = event.label, event.total_bytes
            self.present_bytes = self._planned_present = event.present_bytes
            self._present, self._flying = {}, {}
            self.file_count, self.files_verified = event.file_count, 0
            self._set_ready(False)
        elif isinstance(event, SourceConnected):
            self.peers = event.peers if event.peers else self.peers
            self.sources.connected(event.source)
        elif isinstance(event, SourceLied):
            self.failures["lie"] += 1
            self.sources.lied(event.source, event.where)
        elif isinstance(event, BytesDropped) and "hash" in event.reason:
            self.failures["piece"] += 1
        elif isinstance(event, SnapshotReady):
            self.present_bytes, self._flying = self.total_bytes, {}
            self._set_ready(True)

    def _set_ready(self, is_ready: bool) -> None:
        self.is_ready = is_ready
        if is_ready and self.seconds_to_ready is None:
            self.seconds_to_ready = round(self.clock() - self._began, 3)


def _kind_of(source: str) -> str:
    # The labels that sources go by: a torrent says so, local ones have words, a mirror is a host.
    if source.startswith("torrent "):
        return "torrent"
    return "local" if " " in source else "http"
