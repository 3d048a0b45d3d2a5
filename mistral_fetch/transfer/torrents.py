"""Offers that come from a torrent: a file, a magnet link, a catalog entry, or a link in a manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mistral_fetch.bittorrent.listen import listen_interfaces
from mistral_fetch.bittorrent.magnet import Magnet, parse_magnet
from mistral_fetch.bittorrent.metainfo import MAX_TORRENT_BYTES, Metainfo, metainfo_to_manifest, parse_metainfo
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.catalog_values import TorrentChannel
from mistral_fetch.config import Settings
from mistral_fetch.digest import Assurance
from mistral_fetch.events import Report
from mistral_fetch.manifest import Manifest, TorrentLink
from mistral_fetch.sources.base import Source, StopSignal
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.sources.pieces import PieceGiver
from mistral_fetch.sources.swarm import SwarmSource
from mistral_fetch.sources.swarm_pieces import SwarmPieces
from mistral_fetch.store.layout import Layout
from mistral_fetch.transfer.local import read_local_file
from mistral_fetch.transfer.offer import Offer


class TorrentResolver:
    """Opens torrents. A torrent's state (metadata of a magnet, record of clean stops) lies with the partials."""

    def __init__(self, layout: Layout, settings: Settings, http: HttpClient, report: Report, stop: StopSignal) -> None:
        self._layout = layout
        self._http = http
        self._report = report
        self._stop = stop
        self._state_directories: list[Path] = []
        self._sources: list[SwarmSource] = []
        self._share_seconds = settings.share_time
        self._swarm = SwarmSettings(
            peers=settings.peers,
            use_trackers=settings.trackers,
            dht=settings.dht,
            dht_nodes=",".join(settings.dht_nodes),
            lsd=settings.lsd,
            pex=settings.pex,
            encryption=settings.encryption,
            proxy=settings.proxy,
            listen_interfaces=listen_interfaces(settings.listen),
            incoming=True if settings.listen or settings.share else None,
            uploads=settings.share,
            download_limit_bytes_per_second=settings.limit or None,
            upload_limit_bytes_per_second=settings.upload_limit or None,
            no_peers_timeout_seconds=settings.peer_timeout,
            stall_timeout_seconds=settings.stall_timeout,
            metadata_timeout_seconds=max(settings.peer_timeout, 1.0) if not settings.dht else 60.0,
        )

    def from_file(self, location: str, *, is_url: bool) -> Offer:
        """Return the offer of a ``.torrent`` file or address."""
        return self._offer(self._load(location, is_url=is_url))

    def from_magnet(self, text: str) -> Offer:
        """Return the offer of a magnet link; asks the swarm for its metadata if no earlier run did."""
        return self._offer(parse_magnet(text))

    def from_channel(self, channel: TorrentChannel) -> Offer:
        """Return a catalog release's torrent, with what the catalog knows of its files."""
        offer = self._offer(parse_magnet(channel.magnet))
        pins = {pin.path: pin.entry() for pin in channel.files}
        entries = [
            replace(entry, digests=pins[entry.path].digests) if entry.path in pins else entry
            for entry in offer.manifest.files
        ]
        return replace(offer, manifest=Manifest(tuple(entries), channel.info))

    def sources_of(self, manifest: Manifest) -> list[Callable[[], Source]]:
        """Return a source for each torrent that holds all files of a manifest, fetched only when its turn comes."""
        return [partial(self._linked_source, link.url) for link in self._links_of(manifest)]

    def givers_of(self, manifest: Manifest) -> list[PieceGiver]:
        """Return who brings pieces of a manifest's files while mirrors do: the swarm of each torrent that holds all."""
        return [
            SwarmPieces(
                partial(self._load_link, link.url),
                f"torrent {unquote(urlsplit(link.url).path).rpartition('/')[2]}",
                self._swarm,
                self._state_of,
            )
            for link in self._links_of(manifest)
        ]

    def _links_of(self, manifest: Manifest) -> list[TorrentLink]:
        links = [{link.url: link for link in entry.torrents} for entry in manifest.files]
        shared = [link for url, link in (links[0] if links else {}).items() if all(url in urls for urls in links)]
        # A hybrid and a plain v1 torrent of the same files have swarms of their own: stronger proof first.
        return sorted(shared, key=lambda link: not link.needs_v2)

    def _linked_source(self, url: str) -> Source:
        return self._source(self._load_link(url))

    def linger(self, directory: Path) -> None:
        """Go on giving a model that is complete in ``directory`` to peers that lack it, if that was asked for."""
        for source in self._sources:
            source.linger(directory, self._share_seconds, self._stop)

    def state_directories(self) -> list[Path]:
        """Return the state directories of the torrents opened so far."""
        return list(self._state_directories)

    def _load_link(self, url: str) -> Metainfo:
        is_local = url.startswith("file:")
        return self._load(unquote(urlsplit(url).path) if is_local else url, is_url=not is_local)

    def _load(self, location: str, *, is_url: bool) -> Metainfo:
        data = (
            self._http.get_bytes(location, MAX_TORRENT_BYTES, stop=self._stop) if is_url else read_local_file(location)
        )
        return parse_metainfo(data)

    def _source(self, torrent: Metainfo | Magnet) -> SwarmSource:
        source = SwarmSource(torrent, self._swarm, self._state_of(torrent))
        self._sources.append(source)
        return source

    def _state_of(self, torrent: Metainfo | Magnet) -> Path:
        state = self._layout.partial(f"torrent-{torrent.info_hash}")
        if state not in self._state_directories:
            self._state_directories.append(state)
        return state

    def _offer(self, torrent: Metainfo | Magnet) -> Offer:
        source = self._source(torrent)
        metainfo = source.metainfo(self._report, self._stop)
        # Named by what vouches for it: a hybrid that a v1 magnet led to is known by SHA-1 alone.
        is_v2 = source.assurance is Assurance.BTV2
        return Offer(
            "torrent",
            f"btmh-{metainfo.info_hash_v2}" if is_v2 else f"btih-{metainfo.info_hash}",
            metainfo_to_manifest(metainfo),
            (lambda: source,),
            scratch=self.state_directories,
        )
