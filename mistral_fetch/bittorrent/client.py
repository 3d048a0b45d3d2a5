"""One running torrent: libtorrent's session and handle behind plain methods and values.

Owns what libtorrent is told: where bytes go, which files are wanted, what may be trusted. Knows nothing of
partials, timeouts or what to do when a peer lies; :mod:`mistral_fetch.bittorrent.transfer` decides that.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libtorrent as lt

from mistral_fetch.bittorrent.alerts import (
    ALERT_MASK,
    BLOCK_ALERTS,
    Alert,
    CacheFlushed,
    DiskFailed,
    TorrentRemoved,
    drain,
)
from mistral_fetch.bittorrent.load import load_parameters
from mistral_fetch.bittorrent.metainfo import Metainfo
from mistral_fetch.bittorrent.peers import Endpoint, format_peer
from mistral_fetch.bittorrent.resume import PieceRecord, save_record, sync_files, take_record
from mistral_fetch.bittorrent.settings import SwarmSettings, session_settings
from mistral_fetch.errors import StoreError
from mistral_fetch.store.durable import explain_os_error, has_blocks

_WANTED = 4
_UNWANTED = 0
_BLOCK_FINISHED = 3
_BLOCKED = 1  # libtorrent's name for it is missing in Python
# Never here: no_verify_files (libtorrent 2.1.1 crashes soon after) and bit 25 (it crashes hybrids with web seeds).
_FLAGS = lt.torrent_flags.update_subscribe | lt.torrent_flags.apply_ip_filter
_NO_PEX = lt.torrent_flags.disable_pex
_ALONE = lt.torrent_flags.disable_dht | lt.torrent_flags.disable_lsd | lt.torrent_flags.disable_pex
_NOT_YET_CONNECTED = lt.peer_info.connecting | lt.peer_info.handshake
# Without libtorrent's smart banning: it shuts out an honest peer beside a lying web seed (measured: each time).
# Peers that had a part in a failed piece get pieces of their own next, and so are found out all the same.
_NO_PLUGINS = 0
FLUSH_TIMEOUT_SECONDS = 120.0
REMOVE_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class ConnectedPeer:
    """A peer; its address can be connected to by others if we did so ourselves."""

    endpoint: Endpoint
    has_all: bool
    is_known_address: bool


@dataclass(frozen=True)
class DownloadStatus:
    """Where a torrent stands.

    ``file_bytes`` counts blocks, verified or not; ``verified_bytes`` whole pieces; ``failed_bytes`` what was
    received in vain since the torrent was added to the session.
    """

    is_checking: bool
    is_finished: bool
    file_bytes: Mapping[int, int]
    verified_bytes: Mapping[int, int]
    peers: tuple[str, ...]
    failed_bytes: int
    downloaded_bytes: int
    uploaded_bytes: int


def open_session(settings: SwarmSettings, trackers: tuple[str, ...]) -> lt.session:
    """Return a running session that talks to nobody yet; ``trackers`` are what the torrent names."""
    incoming = settings.accepts_incoming(trackers)
    pack: Any = {**session_settings(settings, incoming=incoming), "alert_mask": ALERT_MASK}
    session = lt.session(pack, _NO_PLUGINS)
    session.add_extension("ut_metadata")
    if settings.pex:
        session.add_extension("ut_pex")
    return session


class Download:
    """Fetches some files of a torrent to given places.

    Args:
        metainfo: The validated torrent.
        data_paths: Where each wanted file's bytes go, by file index. The files exist already, at full size.
        state_directory: For the record of clean stops, and for pieces that reach into files not wanted.
        settings: What to ask of the swarm.
    """

    def __init__(
        self, metainfo: Metainfo, data_paths: Mapping[int, Path], state_directory: Path, settings: SwarmSettings
    ) -> None:
        self._metainfo = metainfo
        self._data_paths = dict(data_paths)
        self._state_directory = state_directory
        self._settings = settings.for_private() if metainfo.is_private else settings
        self._session: lt.session | None = None
        self._handle: lt.torrent_handle | None = None
        self._waiting: list[Alert] = []

    def start(self, peers: Iterable[Endpoint]) -> None:
        """Begin: trust the last clean stop if nothing changed since, else check what lies on the disk.

        Raises:
            UnsafeTorrent: libtorrent reads the torrent differently.
            StoreError: The disk refused.
        """
        pieces = take_record(self._state_directory, self._metainfo, self._data_paths)
        parameters = self._parameters()
        if pieces is not None:
            _trust(parameters, pieces)
        elif not any(has_blocks(path) for path in self._data_paths.values()):
            # Nothing but holes: saying so spares libtorrent from hashing gigabytes of zeros.
            parameters.have_pieces = [False] * self._metainfo.piece_count
        parameters.peers = list(peers)
        self._session = open_session(self._settings, self._metainfo.trackers)
        self._handle = self._session.add_torrent(parameters)

    def poll(self, seconds: float) -> list[Alert]:
        """Return what happened, after waiting up to ``seconds`` for something to happen."""
        if not self._waiting:
            self._running_session.wait_for_alert(int(seconds * 1000))
        alerts = [*self._waiting, *drain(self._running_session)]
        self._waiting = []
        return alerts

    def status(self) -> DownloadStatus:
        """Return where the torrent stands now."""
        handle = self._running_handle
        status = handle.status(lt.status_flags_t.query_accurate_download_counters)
        states = lt.torrent_status.states
        blocks = handle.file_progress()
        pieces = handle.file_progress(lt.file_progress_flags_t.piece_granularity)
        return DownloadStatus(
            is_checking=status.state in {states.checking_files, states.checking_resume_data, states.allocating},
            is_finished=status.state in {states.finished, states.seeding},
            file_bytes={index: blocks[index] for index in self._data_paths if index < len(blocks)},
            verified_bytes={index: pieces[index] for index in self._data_paths if index < len(pieces)},
            peers=tuple(format_peer(peer.endpoint) for peer in self.connected()),
            failed_bytes=status.total_failed_bytes,
            downloaded_bytes=status.total_payload_download,
            uploaded_bytes=status.total_payload_upload,
        )

    def verified_pieces(self) -> list[int]:
        """Return which pieces are there and match."""
        have = self._running_handle.status(lt.status_flags_t.query_pieces).pieces
        return [piece for piece, is_there in enumerate(have) if is_there]

    def availability(self) -> Sequence[int]:
        """Return how many connected peers have each piece; empty while none is connected."""
        return self._running_handle.piece_availability()

    def received_bytes(self) -> dict[int, int]:
        """Return how much has come of each piece that is being fetched."""
        received: dict[int, int] = {}
        for piece in self._running_handle.get_download_queue():
            received[piece["piece_index"]] = sum(block["bytes_progress"] for block in piece["blocks"])
        return received

    def connected(self) -> list[ConnectedPeer]:
        """Return the peers that are connected now."""
        peer_info = lt.peer_info
        return [
            ConnectedPeer(
                (str(peer.ip[0]), int(peer.ip[1])),
                has_all=bool(peer.flags & peer_info.seed),
                is_known_address=bool(peer.flags & peer_info.local_connection),
            )
            for peer in self._running_handle.get_peer_info()
            if not peer.flags & _NOT_YET_CONNECTED
        ]

    def connect(self, peers: Iterable[Endpoint]) -> None:
        """Ask for connections to these peers, now."""
        for peer in peers:
            self._running_handle.connect_peer(peer)

    def restart_with(self, peer: Endpoint, banned: Sequence[Endpoint]) -> None:
        """Forget all peers and bans, keep every verified piece, and talk to ``peer`` alone."""
        pieces = self._stop_and_flush()
        self._running_session.remove_torrent(self._running_handle)
        self._wait_for(TorrentRemoved, REMOVE_TIMEOUT_SECONDS)
        parameters = self._parameters()
        if pieces is not None:
            _trust(parameters, pieces)
        parameters.trackers, parameters.url_seeds = [], []
        parameters.flags |= _ALONE
        parameters.peers, parameters.banned_peers = [peer], list(banned)
        self._handle = self._running_session.add_torrent(parameters)

    def open_up(self, peers: Iterable[Endpoint], shunned_web_seeds: Collection[str]) -> None:
        """Look for other peers again, after :meth:`restart_with` found an honest one."""
        handle = self._running_handle
        if self.looks_around:
            handle.unset_flags(_ALONE if self._settings.pex else _ALONE & ~_NO_PEX)
        for url in self._trackers():
            handle.add_tracker({"url": url})
        for url in self._web_seeds():
            if url not in shunned_web_seeds:
                handle.add_url_seed(url)
        self.connect(peers)

    def stop(self) -> None:
        """Make everything received durable and record it, so that the next start need not check.

        Raises:
            StoreError: The disk refused.
        """
        pieces = self._stop_and_flush()
        if pieces is None:
            sync_files(self._data_paths)
        else:
            save_record(self._state_directory, self._metainfo, self._data_paths, pieces)

    def close(self) -> None:
        """End the session. Without :meth:`stop` before, the next start checks the disk."""
        if self._session is not None and self._handle is not None:
            self._session.remove_torrent(self._handle)
        self._handle = None
        self._session = None

    def flush(self) -> bool:
        """Have everything received written to the files, not yet durably; return whether that came to an end."""
        self._running_handle.flush_cache()
        return self._wait_for(CacheFlushed, FLUSH_TIMEOUT_SECONDS) is not None

    def recheck(self) -> None:
        """Begin to hash every wanted byte again, as it lies in the files; what is wrong is then fetched anew."""
        self.flush()
        self._running_handle.force_recheck()

    def count_dht_nodes(self) -> None:
        """Ask how many nodes of the DHT are known; the answer is among the alerts."""
        self._running_session.post_dht_stats()

    def watch_blocks(self) -> None:
        """Tell of every block from now on, not only of pieces."""
        pack: Any = {"alert_mask": ALERT_MASK | BLOCK_ALERTS}
        self._running_session.apply_settings(pack)

    def block(self, host: str) -> None:
        """Refuse every connection to and from a host, whatever its port."""
        rules = self._running_session.get_ip_filter()
        rules.add_rule(host, host, _BLOCKED)
        self._running_session.set_ip_filter(rules)

    @property
    def is_open(self) -> bool:
        """Return whether it was started and not closed."""
        return self._handle is not None

    @property
    def looks_around(self) -> bool:
        """Return whether peers are looked for beyond the named ones."""
        return self._settings.looks_around(self._metainfo.trackers)

    @property
    def uses_dht(self) -> bool:
        """Return whether the DHT is asked for peers."""
        return self._settings.dht and not self._settings.proxy

    @property
    def has_places_to_ask(self) -> bool:
        """Return whether anything but named peers can lead to the data."""
        return self.looks_around or bool(self._web_seeds())

    @property
    def _running_session(self) -> lt.session:
        assert self._session is not None, "start() comes first"
        return self._session

    @property
    def _running_handle(self) -> lt.torrent_handle:
        assert self._handle is not None, "start() comes first"
        return self._handle

    def _parameters(self) -> lt.add_torrent_params:
        parameters = load_parameters(self._metainfo)
        parameters.save_path = str(self._state_directory)
        parameters.flags = _FLAGS if self.looks_around else _FLAGS | (_ALONE & ~_NO_PEX)
        if not self._settings.uploads:
            # In order, so that the whole file is hashed while it comes. Who gives nothing back leaves the swarm's
            # stock of rare pieces as it is, in whatever order it takes them.
            parameters.flags |= lt.torrent_flags.sequential_download
        if not self._settings.pex:
            parameters.flags |= _NO_PEX
        parameters.trackers = self._trackers()
        parameters.tracker_tiers = list(range(len(parameters.trackers)))
        parameters.url_seeds = self._web_seeds()
        parameters.file_priorities = [
            _WANTED if index in self._data_paths else _UNWANTED for index in range(_file_count(parameters))
        ]
        # Every file gets a place of ours, wanted or not: no name from outside ever reaches the disk.
        places = {file.index: self._state_directory / "unwanted" / str(file.index) for file in self._metainfo.files}
        parameters.renamed_files = {index: str(path) for index, path in {**places, **self._data_paths}.items()}
        limit = self._settings.download_limit_bytes_per_second
        if limit is not None:
            parameters.download_limit = limit  # the torrent's own: a session's limit does not bind local peers
        upload_limit = self._settings.upload_limit_bytes_per_second
        if upload_limit is not None:
            parameters.upload_limit = upload_limit
        return parameters

    def _trackers(self) -> list[str]:
        return self._settings.usable_trackers(self._metainfo.trackers)

    def _web_seeds(self) -> list[str]:
        return list(self._metainfo.web_seeds) if self._settings.use_web_seeds else []

    def _stop_and_flush(self) -> PieceRecord | None:
        """Stop the transfer, have everything written, and return what is there; None while it is being checked."""
        handle = self._running_handle
        handle.pause()
        is_flushed = self.flush()
        # A piece counts as done when it was hashed in memory; that the disk refused it comes out only here.
        for alert in self._waiting:
            if isinstance(alert, DiskFailed):
                raise disk_error(alert)
        if not is_flushed or self.status().is_checking:
            return None
        # Not libtorrent's own resume data: it holds the whole v2 hash tree, 56 MB for a 13 GiB model.
        pieces = handle.status(lt.status_flags_t.query_pieces).pieces
        return PieceRecord(tuple(map(bool, pieces)), dict(_unfinished(handle)))

    def _wait_for(self, kind: type[Alert], timeout_seconds: float) -> Alert | None:
        """Return the next alert of a kind; the others stay for :meth:`poll`."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            self._running_session.wait_for_alert(200)
            found = None
            for alert in drain(self._running_session):
                if found is None and isinstance(alert, kind):
                    found = alert
                else:
                    self._waiting.append(alert)
            if found is not None:
                return found
        return None


def disk_error(failure: DiskFailed) -> StoreError:
    """Return the error for what libtorrent could not write or read."""
    return explain_os_error(OSError(failure.errno, failure.reason), "writing a download", Path(failure.path))


def _file_count(parameters: lt.add_torrent_params) -> int:
    assert parameters.ti is not None, "load_parameters saw to that"
    return parameters.ti.num_files()


def _unfinished(handle: lt.torrent_handle) -> Iterator[tuple[int, tuple[bool, ...]]]:
    """Yield the pieces that were begun, and which of their blocks are on the disk."""
    for piece in handle.get_download_queue():
        blocks = tuple(block["state"] == _BLOCK_FINISHED for block in piece["blocks"])
        if any(blocks):
            yield piece["piece_index"], blocks


def _trust(parameters: lt.add_torrent_params, pieces: PieceRecord) -> None:
    """Take over what was verified, and nothing else: no peers, bans, limits or places from an earlier run."""
    parameters.have_pieces = list(pieces.have)
    parameters.unfinished_pieces = {index: list(blocks) for index, blocks in pieces.unfinished.items()}
