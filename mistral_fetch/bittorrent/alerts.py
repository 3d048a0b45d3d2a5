"""libtorrent's alerts as values of our own.

An alert dies with the next ``pop_alerts``: everything needed is copied here, at once, and nobody else sees one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import libtorrent as lt

from mistral_fetch.bittorrent.peers import format_peer
from mistral_fetch.errors import printable

Category = lt.alert.category_t
# Peer alerts carry the bans; block alerts tell who sent what, and are switched on only when it is in doubt.
ALERT_MASK = (
    Category.error_notification
    | Category.status_notification
    | Category.storage_notification
    | Category.peer_notification
    | Category.connect_notification
    | Category.piece_progress_notification
)
_PEER_BANNED = 91  # libtorrent's errors have no names in Python
BLOCK_ALERTS = Category.block_progress_notification


@dataclass(frozen=True)
class BlockReceived:
    """A peer sent a block of a piece."""

    piece: int
    block: int
    address: str


@dataclass(frozen=True)
class PeerConnected:
    """A peer may send something from now on."""

    address: str


@dataclass(frozen=True)
class PiecePassed:
    """A piece matched its hash."""

    piece: int


@dataclass(frozen=True)
class PieceRead:
    """The bytes of a piece that was asked for; empty where they could not be read."""

    piece: int
    data: bytes


@dataclass(frozen=True)
class PieceFailed:
    """A piece did not match its hash."""

    piece: int


@dataclass(frozen=True)
class PeerBanned:
    """libtorrent will not talk to this peer again."""

    address: str


@dataclass(frozen=True)
class WebSeedFailed:
    """A web seed could not be used; ``is_banned`` when that is for the wrong bytes it sent."""

    url: str
    reason: str
    is_banned: bool


@dataclass(frozen=True)
class DiskFailed:
    """The disk refused; ``errno`` is 0 where it is not known."""

    path: str
    errno: int
    reason: str


@dataclass(frozen=True)
class TorrentFailed:
    """The torrent was stopped by an error, such as hashes of a hybrid that contradict each other."""

    reason: str


@dataclass(frozen=True)
class ListenFailed:
    """Peers cannot connect to us at this address."""

    address: str
    reason: str


@dataclass(frozen=True)
class DhtFailed:
    """The DHT cannot be joined by one of the nodes it is joined by."""

    reason: str


@dataclass(frozen=True)
class DhtCounted:
    """How many nodes of the DHT are known; comes when asked for."""

    nodes: int


@dataclass(frozen=True)
class Finished:
    """Every wanted piece is there."""


@dataclass(frozen=True)
class CacheFlushed:
    """Everything received so far was handed to the operating system."""


@dataclass(frozen=True)
class TorrentRemoved:
    """The torrent left the session."""


Alert = (
    BlockReceived
    | PeerConnected
    | PiecePassed
    | PieceRead
    | PieceFailed
    | PeerBanned
    | WebSeedFailed
    | DiskFailed
    | TorrentFailed
    | ListenFailed
    | DhtFailed
    | DhtCounted
    | Finished
    | CacheFlushed
    | TorrentRemoved
)


def drain(session: lt.session) -> list[Alert]:
    """Return what happened since the last call."""
    return [copied for alert in session.pop_alerts() for copied in _copy(alert)]


def _copy(alert: lt.alert) -> Iterator[Alert]:
    # The most frequent first: at full speed there are thousands of blocks a second.
    if isinstance(alert, lt.block_finished_alert):
        yield BlockReceived(alert.piece_index, alert.block_index, format_peer(alert.endpoint))
    elif isinstance(alert, lt.piece_finished_alert):
        yield PiecePassed(alert.piece_index)
    elif isinstance(alert, lt.read_piece_alert):
        yield PieceRead(alert.piece, b"" if alert.error.value() else bytes(alert.buffer))
    elif isinstance(alert, lt.peer_connect_alert):
        yield PeerConnected(format_peer(alert.endpoint))
    elif isinstance(alert, lt.hash_failed_alert):
        yield PieceFailed(alert.piece_index)
    elif isinstance(alert, lt.peer_ban_alert):
        yield PeerBanned(format_peer(alert.endpoint))
    elif isinstance(alert, lt.peer_disconnected_alert):
        if _is_ban(alert.error):
            yield PeerBanned(format_peer(alert.endpoint))
    elif isinstance(alert, lt.url_seed_alert):
        # The message is the server's own words, its status line.
        reason = alert.error_message() or alert.error.message()
        yield WebSeedFailed(printable(alert.server_url()), printable(reason), _is_ban(alert.error))
    elif isinstance(alert, lt.file_error_alert):
        yield DiskFailed(alert.filename(), _errno(alert.error), printable(alert.error.message()))
    elif isinstance(alert, lt.torrent_error_alert):
        yield TorrentFailed(printable(alert.error.message()))
    elif isinstance(alert, lt.listen_failed_alert):
        if alert.sock_type == lt.listen_failed_alert_socket_type_t.tcp:  # its UDP socket fails alike
            yield ListenFailed(format_peer(alert.endpoint), printable(alert.error.message()))
    elif isinstance(alert, lt.dht_stats_alert):
        yield DhtCounted(sum(bucket["num_nodes"] for bucket in alert.routing_table))
    elif alert.what() == "dht_error":  # without a class of its own in Python
        yield DhtFailed(printable(alert.message()))
    elif isinstance(alert, lt.torrent_finished_alert):
        yield Finished()
    elif isinstance(alert, lt.cache_flushed_alert):
        yield CacheFlushed()
    elif isinstance(alert, lt.torrent_removed_alert):
        yield TorrentRemoved()


def _is_ban(error: lt.error_code) -> bool:
    return bool(error.category().name() == "libtorrent" and error.value() == _PEER_BANNED)


def _errno(error: lt.error_code) -> int:
    return int(error.value()) if error.category().name() in {"system", "generic"} else 0
