"""One run of a torrent that hands over its pieces one by one instead of filling files: what a mixed transfer needs.

libtorrent writes blocks before it can know whether they are right. So here it writes to files of its own, and only
pieces that passed are read back and handed on; others may write the real file at the same time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mistral_fetch.bittorrent.alerts import Alert, PieceRead
from mistral_fetch.bittorrent.client import Download
from mistral_fetch.bittorrent.conduct import Clocks, Conduct
from mistral_fetch.bittorrent.peers import Endpoint
from mistral_fetch.spans import Span
from mistral_fetch.store.durable import punch_hole

POLL_SECONDS = 0.05
LOOK_SECONDS = 0.25
# Pieces that passed and are held in memory at a time; the others wait on the disk.
MOST_READ = 2
_WANTED = 4


class Taker(Protocol):
    """Whoever takes the pieces of the torrent."""

    @property
    def is_over(self) -> bool:
        """Return whether no piece is wanted any more."""

    @property
    def is_alone(self) -> bool:
        """Return whether silence has to end some time, because nobody else brings anything."""

    def choose(self, availability: Sequence[int]) -> Collection[int]:
        """Return which pieces to fetch now, given how many connected peers have each (nothing known: empty)."""

    def advanced(self, received_bytes: Mapping[int, int]) -> None:
        """Note how much has come of pieces that are not whole yet."""

    def take(self, piece: int, data: bytes) -> Collection[int]:
        """Take a piece that matched its hash; return which pieces will never be asked for again."""


class PieceDownload(Download):
    """A download whose wanted pieces change while it runs."""

    def start(self, peers: Iterable[Endpoint]) -> None:
        """Begin with nothing wanted. See :meth:`~.client.Download.start`."""
        super().start(peers)
        # Between two wishes everything wanted is there: no reason to leave the peers that have the rest.
        pack: Any = {"close_redundant_connections": False}
        self._running_session.apply_settings(pack)
        self._wish: set[int] = set()
        self._running_handle.prioritize_pieces([0] * self._metainfo.piece_count)

    def restart_with(self, peer: Endpoint, banned: Sequence[Endpoint]) -> None:
        """Forget all peers but one. See :meth:`~.client.Download.restart_with`."""
        super().restart_with(peer, banned)
        wish = self._wish
        self._running_handle.prioritize_pieces(
            [_WANTED if index in wish else 0 for index in range(self._metainfo.piece_count)]
        )

    def want(self, pieces: Collection[int]) -> None:
        """Fetch these pieces, and no others."""
        wish = set(pieces)
        changes = [(index, 0) for index in self._wish - wish] + [(index, _WANTED) for index in wish - self._wish]
        if changes:
            self._running_handle.prioritize_pieces(changes)
        self._wish = wish

    def read(self, piece: int) -> None:
        """Ask for the bytes of a piece that passed; they come as :class:`~.alerts.PieceRead`."""
        self._running_handle.read_piece(piece)

    def give_back(self, piece: int) -> None:
        """Free the disk that a piece takes, where the file system can."""
        start = piece * self._metainfo.piece_length
        for file in self._metainfo.files_in_piece(piece):
            span = Span(max(start - file.offset, 0), min(start - file.offset + self._metainfo.piece_length, file.size))
            if file.index in self._data_paths:
                punch_hole(self._data_paths[file.index], span.start, span.length)


@dataclass
class HandOver(Conduct):
    """One run that ends when ``taker`` wants no more."""

    taker: Taker = field(kw_only=True)
    stays_connected: bool = field(default=True, kw_only=True)
    """Whether seeds are wanted at hand even while there is nothing to ask of them."""
    download: PieceDownload
    reading: set[int] = field(default_factory=set)
    unread: dict[int, None] = field(default_factory=dict)
    passed: set[int] = field(default_factory=set)
    given: set[int] = field(default_factory=set)
    last_total: int = 0

    def run(self) -> None:
        """Hand over pieces until no more are wanted, or raise why none can be had."""
        self._start()
        now = time.monotonic()
        clocks = Clocks(last_peer=now, last_byte=now)
        while not self.taker.is_over:
            self.check_stop()
            self._handle(self.download.poll(POLL_SECONDS))
            now = time.monotonic()
            if now - clocks.last_report >= LOOK_SECONDS:
                clocks.last_report = now
                self._look_around(clocks, now)
            self._wish()

    def _handle(self, alerts: list[Alert]) -> None:
        super()._handle(alerts)
        for alert in alerts:
            if isinstance(alert, PieceRead):
                self.reading.discard(alert.piece)
                self._read_on()
                for piece in self.taker.take(alert.piece, alert.data) if alert.data else ():
                    self.given.add(piece)
                    self.download.give_back(piece)

    def _piece_passed(self, piece: int) -> None:
        super()._piece_passed(piece)
        self.passed.add(piece)
        self._read(piece)

    def _read(self, piece: int) -> None:
        if piece not in self.reading:
            self.unread[piece] = None
            self._read_on()

    def _read_on(self) -> None:
        while self.unread and len(self.reading) < MOST_READ:
            piece = next(iter(self.unread))
            del self.unread[piece]
            self.reading.add(piece)
            self.download.read(piece)

    def _wish(self) -> None:
        self.taker.advanced(self.download.received_bytes())
        wanted = set(self.taker.choose(self.download.availability()))
        for piece in (wanted & self.passed) - self.given:
            self._read(piece)  # it was here before this part of it was wanted
        missing = wanted - self.passed
        self.download.want(missing or self._anchor())

    def _anchor(self) -> set[int]:
        """Return something to want while nobody is connected: seeds hang up on whoever seems to have all it wants."""
        if self.peer_count or not self.stays_connected:
            return set()
        pieces = (index for index in reversed(range(self.metainfo.piece_count)) if index not in self.passed)
        return set(itertools.islice((index for index in pieces if self._is_ours(index)), 1))

    def _is_ours(self, piece: int) -> bool:
        return any(file.index in self.paths for file in self.metainfo.files_in_piece(piece))

    def _look_around(self, clocks: Clocks, now: float) -> None:
        status = self.download.status()
        total = sum(status.file_bytes.values())
        has_bytes = total != self.last_total
        self.last_total = total
        self._tell_peers(len(status.peers), has_bytes)
        if has_bytes or not status.peers or not self.taker.is_alone:
            clocks.last_byte = now  # being without peers has a patience of its own
        if status.peers:
            clocks.last_peer = now
        self._look_for_peers(status, clocks, now)
        if self.taker.is_alone:
            self._give_up_in_time(status, clocks, now)
