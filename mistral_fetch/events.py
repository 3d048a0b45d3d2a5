"""What happens during a transfer, as small values. Sources and the executor emit; only front ends consume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TransferPlanned:
    """The work is known: ``total_bytes`` in all, ``present_bytes`` of them already verified on disk."""

    label: str
    total_bytes: int
    present_bytes: int
    file_count: int


@dataclass(frozen=True)
class PieceView:
    """The pieces of a file under way, to look at from any thread: ``senders`` gives who sent each that is present."""

    path: str
    count: int
    senders: Callable[[], Mapping[int, str]]


@dataclass(frozen=True)
class FilesOpened:
    """The files of a transfer can be looked into while it runs; not for lines of text, since it holds functions."""

    views: tuple[PieceView, ...]


@dataclass(frozen=True)
class BytesReceived:
    """``length`` payload bytes of ``path`` came from ``source`` over the network."""

    source: str
    path: str
    length: int


@dataclass(frozen=True)
class BytesDropped:
    """``length`` bytes that were counted as received have to be fetched again."""

    source: str
    path: str
    length: int
    reason: str


@dataclass(frozen=True)
class Progress:
    """``path`` now has ``present_bytes`` of its bytes on disk (a fresh total, not a difference).

    ``flying_bytes`` more have come, of pieces that are not whole yet and may have to be fetched again.
    """

    path: str
    present_bytes: int
    flying_bytes: int = 0


@dataclass(frozen=True)
class BytesVerified:
    """The whole-file check of ``path`` has read ``verified_bytes`` so far."""

    path: str
    verified_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class FileVerified:
    """``path`` matched and is now a blob."""

    path: str
    size: int
    sha256: str
    assurance: str


@dataclass(frozen=True)
class SourceConnected:
    """A source answered: a mirror's host, or the swarm with ``peers`` connected peers."""

    source: str
    peers: int = 0


@dataclass(frozen=True)
class SourceFailed:
    """A source was given up or will be retried; ``reason`` is one line."""

    source: str
    reason: str
    will_retry: bool


@dataclass(frozen=True)
class SourceLied:
    """A source sent wrong bytes and was dropped (integrity rule 5)."""

    source: str
    path: str
    where: str
    expected: str
    actual: str


@dataclass(frozen=True)
class Notice:
    """Something worth one line that is not a failure, such as a repaired magnet link."""

    text: str


@dataclass(frozen=True)
class SnapshotReady:
    """The model is complete and visible at ``directory``."""

    directory: str
    content_digest: str


Event = (
    TransferPlanned
    | FilesOpened
    | BytesReceived
    | BytesDropped
    | Progress
    | BytesVerified
    | FileVerified
    | SourceConnected
    | SourceFailed
    | SourceLied
    | Notice
    | SnapshotReady
)
Report = Callable[[Event], None]


def ignore_events(_event: Event) -> None:
    """Consume an event silently: the report of callers that do not care."""
