"""How to deal with a swarm, whatever is done with its pieces: peers that lie or leave, silence, and when to give up.

Owns the decisions; how libtorrent is driven is :mod:`mistral_fetch.bittorrent.client`'s business, and what becomes of
the pieces that of whoever runs the torrent: :mod:`.transfer` fills files, :mod:`.hand_over` hands pieces over.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from mistral_fetch.bittorrent.alerts import (
    Alert,
    BlockReceived,
    DiskFailed,
    ListenFailed,
    PeerBanned,
    PeerConnected,
    PieceFailed,
    PiecePassed,
    TorrentFailed,
    WebSeedFailed,
)
from mistral_fetch.bittorrent.attribution import Attribution
from mistral_fetch.bittorrent.client import Download, DownloadStatus, disk_error
from mistral_fetch.bittorrent.metainfo import Metainfo
from mistral_fetch.bittorrent.peers import Endpoint, format_peer, parse_peer, resolve_peers
from mistral_fetch.bittorrent.remarks import Remarks
from mistral_fetch.bittorrent.settings import SwarmSettings, find_peers_hint
from mistral_fetch.errors import NoPeers, PieceMismatch, Stalled, SwarmError
from mistral_fetch.events import Notice, Report, SourceConnected, SourceFailed, SourceLied

RECONNECT_SECONDS = 2.0
# How long to be without anybody before a suspect is tried again: libtorrent may still be connecting to others.
LONELY_SECONDS = 2.0
# After how long without anybody to ask whether the DHT answers at all.
DHT_SECONDS = 4.0


@dataclass
class Clocks:
    """Since when what has been so, in monotonic seconds."""

    last_peer: float
    last_byte: float
    last_report: float = 0.0
    last_connect: float = 0.0
    trial_began: float | None = None


@dataclass
class Conduct:
    """One run of one torrent.

    ``paths`` are the wanted files' names for the events, by file index; ``check_stop`` is called often and raises to
    end the run.
    """

    download: Download
    metainfo: Metainfo
    paths: Mapping[int, str]
    settings: SwarmSettings
    label: str
    report: Report
    check_stop: Callable[[], None]
    attribution: Attribution = field(init=False)
    remarks: Remarks = field(init=False)
    endpoints: list[Endpoint] = field(default_factory=list)
    lying_web_seeds: set[str] = field(default_factory=set)
    peer_count: int = 0
    passed_in_trial: int = 0
    failed_path: str = ""

    def __post_init__(self) -> None:
        self.attribution = Attribution(self.metainfo.blocks_in_piece)
        self.remarks = Remarks(self.settings, self.report)

    def _start(self) -> None:
        """Begin to talk to peers; what to watch out for is said."""
        self.check_stop()
        self.endpoints = resolve_peers(self.settings.peers, looks_up=not self.settings.proxy)
        self.remarks.begin(self.metainfo)
        self.download.start(self._first_peers())

    def _first_peers(self) -> list[Endpoint]:
        return self.endpoints

    def _handle(self, alerts: list[Alert]) -> None:
        for alert in alerts:
            if isinstance(alert, BlockReceived):
                self.attribution.block_received(alert.piece, alert.block, alert.address)
            elif isinstance(alert, PeerConnected):
                self._peer_connected(alert.address)
            elif isinstance(alert, PiecePassed):
                self._piece_passed(alert.piece)
            elif isinstance(alert, PieceFailed):
                self._piece_failed(alert.piece)
            elif isinstance(alert, PeerBanned):
                if self.attribution.banned(alert.address):
                    reason = "banned: it had a part in pieces that failed, others had too"
                    self.report(SourceFailed(f"peer {alert.address}", reason, will_retry=True))
            elif isinstance(alert, WebSeedFailed):
                if alert.is_banned:
                    self.lying_web_seeds.add(alert.url)
                self.report(SourceFailed(f"web seed {alert.url}", alert.reason, will_retry=not alert.is_banned))
            elif isinstance(alert, DiskFailed):
                raise disk_error(alert)
            elif isinstance(alert, TorrentFailed):
                raise SwarmError(
                    f"{self.label} cannot go on",
                    detail=f"expected a consistent torrent, got: {alert.reason}",
                    hint="fetch with --via http, or get the .torrent from its publisher again",
                )
            elif not isinstance(alert, ListenFailed) or self.settings.accepts_incoming(self.metainfo.trackers):
                self.remarks.handle(alert)  # an address nobody may connect to anyway is not missed

    def _peer_connected(self, address: str) -> None:
        was_clear = not self.attribution.needs_blocks
        self.attribution.peer_connected(address)
        if was_clear and self.attribution.needs_blocks:
            self.download.watch_blocks()

    def _piece_passed(self, piece: int) -> None:
        self.attribution.piece_passed(piece)
        self.passed_in_trial += 1

    def _piece_failed(self, piece: int) -> None:
        path, where = self._where(piece)
        self.failed_path = path or self.failed_path
        liar = self.attribution.piece_failed(piece)
        if liar is not None:
            expected = self.metainfo.piece_hash(piece)
            self.report(SourceLied(f"peer {liar}", path, where, expected, "other bytes"))
            self._shut_out(liar)

    def _shut_out(self, liar: str) -> None:
        # A banned peer comes back from another port; but a host can be shared, as all are on loopback.
        host, _ = parse_peer(liar)
        others = {address for address in self.download.status().peers if address != liar}
        hosts = {parse_peer(address)[0] for address in others} | {endpoint[0] for endpoint in self._welcome_endpoints()}
        if host not in hosts and not ipaddress.ip_address(host).is_loopback:
            self.download.block(host)

    def _where(self, piece: int) -> tuple[str, str]:
        files = self.metainfo.files_in_piece(piece)
        start = piece * self.metainfo.piece_length
        return (files[0].path if files else ""), f"piece {piece}, from byte {start} of the torrent"

    def _tell_peers(self, count: int, has_bytes: bool) -> None:
        if has_bytes and not self.peer_count:
            count = max(count, 1)  # it came, gave all there was and has left again
        if count and count != self.peer_count:
            self.report(SourceConnected(self.label, count))
        self.peer_count = count

    def _look_for_peers(self, status: DownloadStatus, clocks: Clocks, now: float) -> None:
        if clocks.trial_began is not None:
            self._go_on_with_trial(status, clocks, now)
        elif not status.peers and self.attribution.suspects and now - clocks.last_peer > LONELY_SECONDS:
            self._begin_trial(clocks, now)
        elif not status.peers and now - clocks.last_connect > RECONNECT_SECONDS:
            clocks.last_connect = now
            self.download.connect(self._welcome_endpoints())
            if self.download.uses_dht and now - clocks.last_peer > DHT_SECONDS:
                self.download.count_dht_nodes()

    def _begin_trial(self, clocks: Clocks, now: float) -> None:
        """Talk to one suspect alone: if the next failed piece is all its own, it is proven; else it was innocent."""
        suspect = self.attribution.begin_trial()
        if suspect is None:
            return
        self.report(Notice(f"peer {suspect} was banned together with others; asking it again, alone"))
        banned = [parse_peer(address) for address in self.attribution.proven]
        self.passed_in_trial = 0
        self.download.restart_with(parse_peer(suspect), banned)
        clocks.trial_began = clocks.last_peer = now

    def _go_on_with_trial(self, status: DownloadStatus, clocks: Clocks, now: float) -> None:
        if self.passed_in_trial > 0 and status.peers:
            clocks.trial_began = None
            self.download.open_up(self._welcome_endpoints(), self.lying_web_seeds)
        elif not status.peers and now - clocks.last_peer > LONELY_SECONDS:
            clocks.trial_began = None  # gone, or proven a liar: the next one's turn

    def _welcome_endpoints(self) -> list[Endpoint]:
        shunned = {*self.attribution.proven, *self.attribution.suspects}
        return [endpoint for endpoint in self._to_meet() if format_peer(endpoint) not in shunned]

    def _to_meet(self) -> Iterable[Endpoint]:
        return self.endpoints

    def _give_up_in_time(self, status: DownloadStatus, clocks: Clocks, now: float) -> None:
        silence = now - clocks.last_peer
        nobody_left = not self.endpoints and not self.download.has_places_to_ask
        if not status.peers and (silence > self.settings.no_peers_timeout_seconds or nobody_left):
            raise self._nobody(silence)
        if now - clocks.last_byte > self.settings.stall_timeout_seconds:
            raise Stalled(
                f"{self.label} stalled",
                detail=f"expected bytes from {len(status.peers)} peers, got none for {now - clocks.last_byte:.0f} s",
                hint="run it again later, name a seed with --peer HOST:PORT, or fetch with --via http",
            )

    def _nobody(self, silence: float) -> NoPeers | PieceMismatch:
        hint = find_peers_hint(self.settings)
        if self.attribution.proven:
            address, piece = next(iter(self.attribution.proven.items()))
            path, where = self._where(piece)
            return PieceMismatch(
                f"{path} cannot be had from {self.label}: every peer found sent wrong bytes, first {address}",
                detail=f"expected {self.metainfo.piece_hash(piece)} for {where}, got other bytes",
                hint=hint,
            )
        return NoPeers(
            f"nobody who has the data was found for {self.label}",
            detail=f"expected a peer, got none in {silence:.0f} s",
            hint=hint,
        )
