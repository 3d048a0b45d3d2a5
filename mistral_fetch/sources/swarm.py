"""A torrent's swarm as a source: fills the partials it is handed from peers and web seeds.

Owns which torrent, into which partials, and what is kept between processes; the transfer itself is
:mod:`mistral_fetch.bittorrent.transfer`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mistral_fetch.bittorrent.client import Download
from mistral_fetch.bittorrent.hand_over import HandOver, PieceDownload
from mistral_fetch.bittorrent.listen import any_listen_interfaces
from mistral_fetch.bittorrent.magnet import Magnet
from mistral_fetch.bittorrent.metadata import ask_for_metadata, check_is_named_by
from mistral_fetch.bittorrent.metainfo import Metainfo, parse_metainfo
from mistral_fetch.bittorrent.node import NodeTransfer
from mistral_fetch.bittorrent.peers import resolve_peers
from mistral_fetch.bittorrent.readback import ReadBack
from mistral_fetch.bittorrent.seed_feed import SeedFeed
from mistral_fetch.bittorrent.settings import SwarmSettings, for_seeds
from mistral_fetch.bittorrent.shared import SharedDownload
from mistral_fetch.bittorrent.transfer import Transfer
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import ManifestError, StoreError, TorrentMismatch
from mistral_fetch.events import Notice, Report, SourceConnected
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.swarm_record import SpanRecorder
from mistral_fetch.store.durable import disk_errors, make_directory, make_sparse, write_durably

METADATA_NAME = "metadata.torrent"


class SwarmSource:
    """Fetches from a torrent's peers; implements :class:`~mistral_fetch.sources.base.Source`.

    Args:
        torrent: The validated torrent, or a magnet link whose metadata is then fetched first.
        settings: What to ask of the swarm.
        state_directory: A directory of this torrent's own, kept until the model is complete: it holds the record
            of clean stops, a magnet's metadata, and pieces that reach into files that were not asked for.
    """

    def __init__(self, torrent: Metainfo | Magnet, settings: SwarmSettings, state_directory: Path) -> None:
        self._torrent = torrent
        self._settings = settings
        self._state_directory = state_directory.absolute()
        self._sharing: NodeTransfer | None = None
        self.label = f"torrent {torrent.info_hash[:8]}…"
        # A magnet proves as much as the hash it names, whatever further hashes the metadata brings along:
        # whoever can make another torrent with the same SHA-1 chooses those, too.
        self.assurance = Assurance.BTV2 if torrent.info_hash_v2 else Assurance.BTV1

    def metainfo(self, report: Report, stop: StopSignal) -> Metainfo:
        """Return the torrent, fetching a magnet's metadata once and keeping it for later processes.

        Raises:
            MetadataTimeout: Nobody sent it in time.
            ManifestError: What was sent is malformed or hostile.
            StoreError: The disk refused.
            Interrupted: ``stop`` was set.
        """
        if isinstance(self._torrent, Magnet):
            magnet = self._torrent
            metainfo = self._kept_metadata(magnet)
            if metainfo is None:
                metainfo = fetch_metadata(magnet, self._settings, stop, report)
                with disk_errors("keeping a torrent's metadata", self._state_directory):
                    write_durably(self._state_directory / METADATA_NAME, metainfo.data)
            self._settings = replace(self._settings, peers=(*self._settings.peers, *magnet.peers))
            self._torrent = metainfo
        return self._torrent

    def fetch(self, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        """Fill every target's partial. See :class:`~mistral_fetch.sources.base.Source`.

        Raises:
            TorrentMismatch: The torrent describes other files.
            NoPeers: Nobody who has the data was found.
            Stalled: Peers are there, but bytes are not.
            PieceMismatch: All there was to ask sent wrong bytes.
        """
        metainfo = self.metainfo(report, stop)
        by_index = match_targets(metainfo, targets, self.label)
        for target in by_index.values():
            target.partial.prepare()
        data_paths = {index: target.partial.data_path.absolute() for index, target in by_index.items()}
        recorder = SpanRecorder({index: target.partial for index, target in by_index.items()}, self.label)
        self._stop_sharing()
        download, begin = self._leech(metainfo, data_paths)
        if self._settings.uploads:
            download, begin = self._node(metainfo, data_paths, report, stop)
        transfer = begin(
            download,
            metainfo,
            {index: target.entry.path for index, target in by_index.items()},
            self._settings,
            self.label,
            report,
            stop.check,
            read_back=ReadBack(metainfo, data_paths, recorder.proved),
            on_change=recorder.forget,
            # A file with a sha256 of its own is proved by the store; the others only the torrent can prove.
            proves_files=any(target.entry.sha256 is None for target in targets),
        )
        try:
            transfer.run()
            recorder.flush()
            self._sharing = transfer if isinstance(transfer, NodeTransfer) else None
        except StoreError:
            raise  # nothing more can be recorded
        except BaseException:
            recorder.flush()
            raise
        finally:
            if self._sharing is None:
                download.close()

    def linger(self, directory: Path, most_seconds: float, stop: StopSignal) -> None:
        """Go on giving after a fetch that shares, for as long as somebody lacks something, within limits.

        Args:
            directory: Where the model is complete.
            most_seconds: The longest time.
            stop: Ends it.
        """
        node = self._sharing
        if node is not None:
            paths = {index: (directory / path).absolute() for index, path in node.paths.items()}
            node.linger(paths, most_seconds, stop.is_set)
        self._stop_sharing()

    def _stop_sharing(self) -> None:
        node, self._sharing = self._sharing, None
        if node is not None:
            node.download.close()

    def _leech(self, metainfo: Metainfo, data_paths: Mapping[int, Path]) -> tuple[Download, Callable[..., Transfer]]:
        return Download(metainfo, data_paths, self._state_directory, self._settings), Transfer

    def _node(
        self, metainfo: Metainfo, data_paths: Mapping[int, Path], report: Report, stop: StopSignal
    ) -> tuple[Download, Callable[..., Transfer]]:
        """Return the download that shares, and how its run begins: with a session of its own for whole seeds."""
        staging, settings = self._state_directory / "staged", for_seeds(self._settings, any_listen_interfaces())
        shared = SharedDownload(metainfo, data_paths, self._state_directory, self._settings)
        feed = SeedFeed(shared, metainfo, data_paths)
        sizes = {file.index: file.size for file in metainfo.files if file.index in data_paths}

        def open_seeds() -> HandOver:
            download = PieceDownload(metainfo, stage(staging, sizes), staging, settings)
            paths = {file.index: file.path for file in metainfo.files if file.index in data_paths}
            label = f"seeds of {self.label}"
            return HandOver(
                download, metainfo, paths, settings, label, report, stop.check, taker=feed, stays_connected=False
            )

        return shared, partial(NodeTransfer, feed=feed, open_seeds=open_seeds)

    def _kept_metadata(self, magnet: Magnet) -> Metainfo | None:
        try:
            metainfo = parse_metainfo((self._state_directory / METADATA_NAME).read_bytes())
            check_is_named_by(metainfo, magnet)
        except (OSError, ManifestError):
            return None  # not there or damaged: fetched again
        return replace(metainfo, trackers=magnet.trackers, web_seeds=magnet.web_seeds)


def fetch_metadata(magnet: Magnet, settings: SwarmSettings, stop: StopSignal, report: Report) -> Metainfo:
    """Return the validated metadata of the torrent that ``magnet`` names, from its peers.

    Raises:
        MetadataTimeout: Nobody sent it in time.
        ManifestError: What was sent is malformed or hostile.
        Interrupted: ``stop`` was set.
    """
    for repair in magnet.repairs:
        report(Notice(f"magnet link: {repair}"))
    label = f"torrent {magnet.info_hash[:8]}…"
    peers = resolve_peers((*settings.peers, *magnet.peers), looks_up=not settings.proxy)

    def on_peers(count: int) -> None:
        if count:
            report(SourceConnected(label, count))

    return ask_for_metadata(magnet, settings, peers, on_peers, stop.check)


def stage(staging: Path, sizes: Mapping[int, int]) -> dict[int, Path]:
    """Return empty files of these sizes, by the same keys, for pieces that are handed on at once.

    Raises:
        StoreError: The disk refused.
    """
    paths = {index: staging / str(index) for index in sizes}
    with disk_errors("making room for a swarm's pieces", staging):
        make_directory(staging)
        for index, path in paths.items():
            make_sparse(path, sizes[index])
    return paths


def match_targets(metainfo: Metainfo, targets: Sequence[Target], label: str) -> dict[int, Target]:
    """Return the targets by file index in the torrent.

    Raises:
        TorrentMismatch: A target is not in the torrent, or has another size there.
    """
    files = {file.path: file for file in metainfo.files}
    matched: dict[int, Target] = {}
    for target in targets:
        file = files.get(target.entry.path)
        expected = target.partial.grid.size
        if file is None or file.size != expected:
            got = "no file of that name" if file is None else f"{file.size} bytes"
            raise TorrentMismatch(
                f"{label} does not have the manifest's {target.entry.path}",
                detail=f"expected {expected} bytes, got {got}",
                hint="this torrent belongs to another release; fetch with --via http, or get the right .torrent",
            )
        matched[file.index] = target
    return matched
