"""Seed a model for as long as it takes: check every piece, offer the right ones, notice changes, stop in good order.

Owns the decisions of ``seed``; libtorrent is driven by :mod:`mistral_fetch.bittorrent.station`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mistral_fetch.bittorrent.magnet import Magnet, magnet_uri
from mistral_fetch.bittorrent.metainfo import Metainfo
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.bittorrent.station import (
    ListenFailed,
    ReadFailed,
    SeedLimits,
    Station,
    StationEvent,
    TorrentStatus,
)
from mistral_fetch.errors import PieceMismatch
from mistral_fetch.events import Notice, Report
from mistral_fetch.publish.listen import ListenAddress, is_anywhere, numeric_host, show_address, told_ports
from mistral_fetch.publish.metrics import Metrics
from mistral_fetch.publish.notify import Supervisor
from mistral_fetch.publish.watch import FileWatch
from mistral_fetch.spans import Span, merge
from mistral_fetch.units import format_size

POLL_SECONDS = 0.2
# A disk that fails at every read must not be hashed without pause.
REREAD_SECONDS = 30.0


@dataclass(frozen=True)
class SeedOptions:
    """What a person asked of ``seed``."""

    listen: ListenAddress
    limits: SeedLimits = field(default_factory=SeedLimits)
    ratio: float | None = None
    """Stop after this many copies were uploaded."""
    duration_seconds: float | None = None
    is_strict: bool = False
    """Refuse to seed at all when a piece is wrong."""
    dht: bool = False
    lsd: bool = False
    encryption: str = "allow"
    watch_seconds: float = 2.0
    """How often the files are looked at for changes."""


@dataclass(frozen=True)
class SeedReady:
    """Every piece was checked and peers may come."""

    name: str
    host: str
    port: int
    size: int
    offered_bytes: int
    magnet: str
    plain_magnet: str

    @property
    def address(self) -> str:
        """Return where it listens."""
        return show_address(self.host or "*", self.port)


@dataclass(frozen=True)
class SeedEnded:
    """What was given away, and why it ended: stopped, ratio or duration."""

    uploaded_bytes: int
    seconds: float
    reason: str


@dataclass
class Seeding:
    """One run of ``seed``.

    Args:
        name: The model's.
        torrents: All torrents of these files, the hybrid first.
        places: Where each file lies, by path; files that are missing are pieces that are not offered.
        options: What was asked.
        metrics: Kept up to date.
        supervisor: Told how it goes.
        report: Told what is worth a line.
        is_stopped: Whether to end.
    """

    name: str
    torrents: Sequence[Metainfo]
    places: Mapping[str, Path]
    options: SeedOptions
    metrics: Metrics
    supervisor: Supervisor
    report: Report
    is_stopped: Callable[[], bool]
    _station: Station = field(init=False)
    _watch: FileWatch = field(init=False)
    _port: int = 0
    _is_settled: bool = False
    _was_ready: bool = False
    _told: set[str] = field(default_factory=set)
    _last_reread: float = -REREAD_SECONDS

    def run(self, on_ready: Callable[[SeedReady], None]) -> SeedEnded:
        """Seed until told to stop, or as long as was asked.

        Args:
            on_ready: Called once, when every piece was checked and the port listens.

        Raises:
            ListenRefused: The address cannot be had.
            PieceMismatch: Pieces are wrong, and it is to be strict or none is right.
            UnsafeTorrent: libtorrent reads a torrent differently.
        """
        began = time.monotonic()
        self._station = Station(self._settings(), self.options.limits)
        try:
            self._open()
            while not (reason := self._reason_to_end(began)):
                self._step(on_ready)
        finally:
            self.supervisor.stopping()
            self.metrics.set_ready(False)
            uploaded = sum(status.uploaded_bytes for status in self._station.statuses())
            self._station.close()
        return SeedEnded(uploaded, round(time.monotonic() - began, 3), reason)

    @property
    def size(self) -> int:
        """Return the bytes of one copy."""
        return sum(file.size for file in self.torrents[0].files)

    def _settings(self) -> SwarmSettings:
        return SwarmSettings(
            uploads=True, dht=self.options.dht, lsd=self.options.lsd, encryption=self.options.encryption
        )

    def _open(self) -> None:
        listen = self.options.listen
        self._port = self._station.listen(numeric_host(listen.host), listen.ports)
        for line in told_ports(listen, self._port):
            self.report(Notice(line))
        self._watch = FileWatch(self.places, self.options.watch_seconds)  # before the check, so that it misses nothing
        for torrent in self.torrents:
            self._station.offer(torrent, self.places)
        self.metrics.offer(self.name, self.size, 0)

    def _step(self, on_ready: Callable[[SeedReady], None]) -> None:
        for event in self._station.poll(POLL_SECONDS):
            self._tell(event)
        statuses = self._station.statuses()
        self.metrics.set_swarm(sum(s.uploaded_bytes for s in statuses), sum(s.peers for s in statuses))
        if any(status.is_checking for status in statuses):
            share = min(status.checked_fraction for status in statuses)
            self.supervisor.starting(f"checking {self.name}: {share * 100:.0f} %")
        elif not self._is_settled:
            self._settle(statuses, on_ready)
        if changed := self._watch.changed():
            self.metrics.add_failure("file", len(changed))
            self._check_again(f"{_some(changed)} changed on the disk")
        self.supervisor.sign_of_life()

    def _settle(self, statuses: Sequence[TorrentStatus], on_ready: Callable[[SeedReady], None]) -> None:
        """Tell what a check found, and begin or go on to offer what is right."""
        self._is_settled = True
        bad = bad_spans(self.torrents[0], statuses[0].missing) or bad_spans(self.torrents[-1], statuses[-1].missing)
        for path, spans in bad.items():
            self.report(Notice(f"{path} is wrong at bytes {_some(map(str, spans))}; those pieces are not offered"))
        self.metrics.add_failure("piece", sum(len(status.missing) for status in statuses))
        wrong = sum(span.length for spans in bad.values() for span in spans)
        nothing_right = all(len(s.missing) == t.piece_count for s, t in zip(statuses, self.torrents, strict=True))
        if bad and (self.options.is_strict or nothing_right):
            raise self._refusal(bad, wrong)
        self.metrics.offer(self.name, self.size, self.size - wrong)
        self.metrics.set_ready(True)
        ready = self._ready(wrong)
        if self._was_ready:
            self.supervisor.status(f"seeding {self.name} again")
            return
        self._was_ready = True
        self.supervisor.ready(f"seeding {self.name} on {ready.address}")
        on_ready(ready)

    def _ready(self, wrong_bytes: int) -> SeedReady:
        host = self.options.listen.host
        peers = (show_address(host, self._port),) if not is_anywhere(host) else ()
        magnets = [magnet_of(torrent, peers) for torrent in self.torrents]
        plain = magnets[1] if len(magnets) > 1 else ""
        return SeedReady(self.name, host, self._port, self.size, self.size - wrong_bytes, magnets[0], plain)

    def _check_again(self, why: str) -> None:
        self.report(Notice(f"{why}; nothing is offered until every piece was checked again"))
        self.metrics.set_ready(False)
        self._is_settled = False
        self._station.recheck()

    def _tell(self, event: StationEvent) -> None:
        if isinstance(event, ReadFailed):
            self._tell_once(f"cannot read {event.path or self.name}: {event.reason}")
            if self._is_settled and time.monotonic() - self._last_reread > REREAD_SECONDS:
                self._last_reread = time.monotonic()
                self._check_again("a file could not be read")
        elif isinstance(event, ListenFailed):
            self._tell_once(f"not listening on {event.address}: {event.reason}")
        else:
            self._tell_once(f"tracker {event.url}: {event.reason}")

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.report(Notice(text))

    def _reason_to_end(self, began: float) -> str:
        if self.is_stopped():
            return "stopped"
        options, given = self.options, self.metrics.uploaded["torrent"]
        if options.ratio is not None and given >= options.ratio * self.size and self._was_ready:
            return "ratio"
        if options.duration_seconds is not None and time.monotonic() - began >= options.duration_seconds:
            return "duration"
        return ""

    def _refusal(self, bad: Mapping[str, Sequence[Span]], wrong_bytes: int) -> PieceMismatch:
        path, spans = next(iter(bad.items()))
        return PieceMismatch(
            f"{self.name} is not what its torrent describes: {path} is wrong at bytes {spans[0]}",
            detail=f"expected every piece to match its hash, got {format_size(wrong_bytes)} that do not,"
            f" in {_some(bad)}",
            hint="mistral-fetch repair REF mends a cache's model; a directory that was changed is published anew",
        )


def magnet_of(torrent: Metainfo, peers: Sequence[str] = ()) -> str:
    """Return the magnet link of a torrent, with peers to ask where they are known."""
    return magnet_uri(
        Magnet(
            torrent.info_hash_v1,
            torrent.info_hash_v2,
            torrent.name,
            torrent.trackers,
            torrent.web_seeds,
            tuple(peers),
        )
    )


def bad_spans(torrent: Metainfo, missing: Sequence[int]) -> dict[str, list[Span]]:
    """Return which bytes of which files are in pieces that are not right."""
    found: dict[str, list[Span]] = {}
    for piece in missing:
        start, end = piece * torrent.piece_length, (piece + 1) * torrent.piece_length
        for file in torrent.files_in_piece(piece):
            span = Span(max(start - file.offset, 0), min(end - file.offset, file.size))
            found.setdefault(file.path, []).append(span)
    return {path: merge(spans) for path, spans in found.items()}


def _some(items: Iterable[object], limit: int = 3) -> str:
    """Return the first few of many, and how many more there are."""
    listed = [str(item) for item in items]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
