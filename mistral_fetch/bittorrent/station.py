"""A seeding session for long runs: several torrents of the same files on one port, watched and told about.

Owns libtorrent's session of ``seed``. Whether to go on with what is right, and for how long, is decided by
:mod:`mistral_fetch.publish.seed`. Nothing here ever writes to the files: torrents are added in upload mode.
"""

from __future__ import annotations

import errno
import ipaddress
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libtorrent as lt

from mistral_fetch.bittorrent.metainfo import Metainfo
from mistral_fetch.bittorrent.seed import seeding_parameters, seeding_settings
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.errors import ListenRefused, printable

_CATEGORIES = lt.alert.category_t
_ALERT_MASK = (
    _CATEGORIES.error_notification
    | _CATEGORIES.status_notification
    | _CATEGORIES.storage_notification
    | _CATEGORIES.tracker_notification
)
_EVERYBODY = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
_REMOVE_TIMEOUT_SECONDS = 10.0
_CHECKING = {
    lt.torrent_status.states.checking_files,
    lt.torrent_status.states.checking_resume_data,
    lt.torrent_status.states.allocating,
}


@dataclass(frozen=True)
class ListenFailed:
    """An address could not be listened on."""

    address: str
    port: int
    errno: int
    reason: str


@dataclass(frozen=True)
class ReadFailed:
    """A file could not be read while seeding; its torrent is stopped until it was checked again."""

    path: str
    reason: str


@dataclass(frozen=True)
class TrackerFailed:
    """A tracker was not reached or refused us."""

    url: str
    reason: str


StationEvent = ListenFailed | ReadFailed | TrackerFailed


@dataclass(frozen=True)
class TorrentStatus:
    """Where one torrent of a station stands."""

    is_checking: bool
    checked_fraction: float
    has_failed: bool
    missing: tuple[int, ...]
    """Pieces that are not offered: wrong or unreadable on the disk. Empty while checking."""
    uploaded_bytes: int
    peers: int


@dataclass
class _Offered:
    metainfo: Metainfo
    parameters_of: Mapping[str, Path]
    handle: lt.torrent_handle
    uploaded_before: int = 0


@dataclass
class SeedLimits:
    """What may be given: bytes per second of all torrents together, and peers served at a time."""

    rate_bytes_per_second: int | None = None
    slots: int | None = None


@dataclass
class Station:
    """One session that seeds torrents from files which lie anywhere.

    Attributes:
        settings: Whom to tell; its addresses are not used, see :meth:`listen`.
        limits: What may be given.
    """

    settings: SwarmSettings
    limits: SeedLimits
    _session: lt.session = field(init=False)
    _offered: list[_Offered] = field(default_factory=list)
    _waiting: list[StationEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        pack: Any = {
            **seeding_settings(self.settings),
            "listen_interfaces": "",
            "alert_mask": _ALERT_MASK,
            "max_retry_port_bind": 0,
            "listen_system_port_fallback": False,
            "unchoke_slots_limit": -1 if self.limits.slots is None else self.limits.slots,
        }
        self._session = lt.session(pack)
        if self.limits.rate_bytes_per_second is not None:
            self._limit_everybody(self.limits.rate_bytes_per_second)

    def listen(self, host: str, ports: Sequence[int]) -> int:
        """Listen on the first free port; return it.

        Args:
            host: A numeric address; empty for every address of this machine.
            ports: What to try, in order; 0 takes any free one.

        Raises:
            ListenRefused: None of them can be had.
        """
        failures: list[ListenFailed] = []
        for port in ports:
            failures = self._try_to_listen(host, port)
            if self._session.is_listening() and not any(failure.errno == errno.EADDRINUSE for failure in failures):
                self._waiting += failures  # of an address that is gone, or of IPv6 where there is none
                return int(self._session.listen_port())
        tried = f"{ports[0]}" if len(ports) == 1 else f"one of {ports[0]} to {ports[-1]}"
        raise ListenRefused(
            f"cannot listen on {host or 'any address'}, port {tried}",
            detail=f"expected a free port, got: {failures[0].reason if failures else 'no usable address'}",
            hint="stop what listens there, or name another port or a range: --listen HOST:6881-6889",
        )

    def offer(self, metainfo: Metainfo, places: Mapping[str, Path]) -> None:
        """Begin to check a torrent's files, then to give away what is right.

        Args:
            metainfo: The torrent.
            places: Where each of its files lies, by path.

        Raises:
            UnsafeTorrent: libtorrent reads the torrent differently.
        """
        handle = self._session.add_torrent(seeding_parameters(metainfo, places, self.settings))
        self._offered.append(_Offered(metainfo, places, handle))

    def recheck(self) -> None:
        """Take every torrent out, files closed, and check it from the first piece; peers come back by themselves."""
        for offered in self._offered:
            offered.uploaded_before += int(offered.handle.status().total_payload_upload)
            self._session.remove_torrent(offered.handle)
        self._wait_until_removed(len(self._offered))
        for offered in self._offered:
            parameters = seeding_parameters(offered.metainfo, offered.parameters_of, self.settings)
            offered.handle = self._session.add_torrent(parameters)

    def poll(self, seconds: float) -> list[StationEvent]:
        """Return what happened, after waiting up to ``seconds`` for something to happen."""
        if not self._waiting:
            self._session.wait_for_alert(int(seconds * 1000))
        events = [*self._waiting, *self._drain()]
        self._waiting = []
        return events

    def statuses(self) -> list[TorrentStatus]:
        """Return where each torrent stands, in the order they were offered."""
        return [self._status(offered) for offered in self._offered]

    def close(self) -> None:
        """Stop seeding: trackers are told, peers are left."""
        for offered in self._offered:
            self._session.remove_torrent(offered.handle)
        self._wait_until_removed(len(self._offered))
        self._offered = []

    def _status(self, offered: _Offered) -> TorrentStatus:
        status = offered.handle.status(lt.status_flags_t.query_pieces)
        is_checking = status.state in _CHECKING
        have = list(status.pieces)
        # A complete torrent has no bitmap: libtorrent forgets it.
        is_complete = bool(status.is_seeding) or is_checking
        missing = () if is_complete else tuple(i for i in range(offered.metainfo.piece_count) if not _has(have, i))
        return TorrentStatus(
            is_checking=is_checking,
            checked_fraction=float(status.progress) if is_checking else 1.0,
            has_failed=bool(status.errc.value()),
            missing=missing,
            uploaded_bytes=offered.uploaded_before + int(status.total_payload_upload),
            peers=int(status.num_peers),
        )

    def _limit_everybody(self, bytes_per_second: int) -> None:
        """Bind every peer: a session's own limit leaves out the local network, a torrent's counts once for each."""
        limited = self._session.create_peer_class("limited")
        description = self._session.get_peer_class(limited)
        description["upload_limit"] = bytes_per_second
        self._session.set_peer_class(limited, description)
        everybody = lt.ip_filter()
        for network in _EVERYBODY:
            everybody.add_rule(str(network[0]), str(network[-1]), 1 << limited)
        self._session.set_peer_class_filter(everybody)

    def _try_to_listen(self, host: str, port: int) -> list[ListenFailed]:
        shown = f"[{host}]" if ":" in host else host
        interfaces = f"{shown}:{port}" if host else f"0.0.0.0:{port},[::]:{port}"
        none: Any = {"listen_interfaces": ""}
        some: Any = {"listen_interfaces": interfaces}
        self._session.apply_settings(none)  # else a port that was had a moment ago stays
        self._session.apply_settings(some)
        self._session.is_listening()  # answered after the settings were applied, so the alerts are there
        happened = self._drain()
        self._waiting += [event for event in happened if not isinstance(event, ListenFailed)]
        return [event for event in happened if isinstance(event, ListenFailed)]

    def _drain(self) -> list[StationEvent]:
        return [event for alert in self._session.pop_alerts() for event in _copy(alert)]

    def _wait_until_removed(self, count: int) -> None:
        deadline = time.monotonic() + _REMOVE_TIMEOUT_SECONDS
        while count > 0 and time.monotonic() < deadline:
            self._session.wait_for_alert(100)
            for alert in self._session.pop_alerts():
                count -= isinstance(alert, lt.torrent_removed_alert)
                self._waiting += _copy(alert)


def _has(have: Sequence[bool], index: int) -> bool:
    return index < len(have) and have[index]


def _copy(alert: lt.alert) -> Iterator[StationEvent]:
    if isinstance(alert, lt.listen_failed_alert):
        if alert.socket_type == lt.socket_type_t.tcp:
            yield ListenFailed(str(alert.address), int(alert.port), alert.error.value(), alert.error.message())
    elif isinstance(alert, lt.file_error_alert):
        yield ReadFailed(alert.filename(), printable(alert.error.message()))
    elif isinstance(alert, lt.torrent_error_alert):
        yield ReadFailed("", printable(alert.error.message()))
    elif isinstance(alert, lt.tracker_error_alert):
        yield TrackerFailed(printable(alert.tracker_url()), printable(alert.error_message() or alert.error.message()))
