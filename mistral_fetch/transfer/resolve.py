"""From a reference to the ways it can be had, best first. The network is asked about each way only in its turn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from mistral_fetch.catalog_values import ArchiveChannel, Channel, HubChannel, TorrentChannel
from mistral_fetch.config import Settings
from mistral_fetch.digest import Digest
from mistral_fetch.errors import AccessError, TransferError, UnknownModel, UnsupportedFormat, UsageError
from mistral_fetch.events import Notice, Report
from mistral_fetch.manifest import FileEntry, Manifest, MirrorUrl
from mistral_fetch.metalink import MAX_METALINK_BYTES, parse_metalink
from mistral_fetch.ref import CatalogRef, HubRef, MagnetRef, ManifestRef, Ref, TorrentRef
from mistral_fetch.sources.base import Source, StopSignal
from mistral_fetch.sources.failover import mirror_urls, scheme_of
from mistral_fetch.sources.http import HttpSource, Politeness
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.sources.hub import HubClient, hub_endpoint, hub_manifest, with_hub_token
from mistral_fetch.sources.limit import RateLimit
from mistral_fetch.sources.local import LocalSource
from mistral_fetch.sources.pieces import PieceGiver
from mistral_fetch.sources.tar_index import TarIndex
from mistral_fetch.sources.urls import HTTP_SCHEMES, host_of
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partials import MAX_PIECE_LENGTH, MIN_PIECE_LENGTH
from mistral_fetch.transfer.archives import archive_candidate
from mistral_fetch.transfer.authenticity import (
    authenticate_document,
    fetch_signature,
    now_utc,
    pinned_keys,
    read_signature,
)
from mistral_fetch.transfer.catalogs import CatalogInForce, kept_catalog
from mistral_fetch.transfer.local import read_local_file
from mistral_fetch.transfer.mirror_scores import load_scores, save_scores
from mistral_fetch.transfer.network import http_settings
from mistral_fetch.transfer.offer import Candidate, Offer
from mistral_fetch.transfer.torrents import TorrentResolver
from mistral_fetch.trust import MANIFEST, Signed, check_expiry, with_signed
from mistral_fetch.units import parse_utc


class Resolver:
    """Knows every kind of reference; owns the HTTP client that its offers share.

    Args:
        layout: The cache, where a torrent's state lies between runs.
        settings: Which sources are acceptable, and how patient to be with them.
        report: Told what is worth a line.
        stop: Asked while the network is waited for.
        may_adopt: The bytes may come from this machine, so that a manifest need not name any source.
        catalog: Where names are looked up, if it was just fetched.
    """

    def __init__(
        self,
        layout: Layout,
        settings: Settings,
        report: Report,
        stop: StopSignal,
        *,
        may_adopt: bool = False,
        catalog: CatalogInForce | None = None,
    ) -> None:
        self._settings = settings
        self._report = report
        self._stop = stop
        self._may_adopt = may_adopt
        self._catalog = catalog
        self._keys = pinned_keys(settings)
        self._http = HttpClient(with_hub_token(http_settings(settings)))
        self._layout = layout
        self._scores = load_scores(layout)
        self._politeness = Politeness(settings.connections, RateLimit(settings.limit or None))
        self._archives = TarIndex(self._http, stop)
        self._hub = HubClient(self._http, hub_endpoint(), stop=stop)
        self._torrents = TorrentResolver(layout, settings, self._http, report, stop)

    def __enter__(self) -> Resolver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        save_scores(self._layout, self._scores)
        self._http.close()

    def candidates(self, ref: Ref) -> Sequence[Candidate]:
        """Return the ways to get what ``ref`` names that the settings allow, best first.

        Raises:
            UnknownModel: The catalog has no such name.
            UsageError: The settings exclude every way there is.
        """
        if isinstance(ref, CatalogRef):
            return self._catalog_candidates(ref)
        if isinstance(ref, HubRef):
            self._refuse_via("torrent", f"hf:{ref.repo} is a web repository")
            return [Candidate("hub", lambda: self._hub_offer(ref))]
        if isinstance(ref, ManifestRef):
            return [Candidate("manifest", lambda: self._manifest_offer(ref))]
        self._refuse_via("http", "a torrent comes from its swarm")
        if isinstance(ref, MagnetRef):
            return [Candidate("torrent", lambda: self._torrents.from_magnet(ref.text))]
        assert isinstance(ref, TorrentRef), "directories were refused before"
        return [Candidate("torrent", lambda: self._torrents.from_file(ref.location, is_url=ref.is_url))]

    def _refuse_via(self, via: str, because: str) -> None:
        if self._settings.via == via:
            raise UsageError(
                f"--via {via} leaves no source for this model",
                detail=f"expected a source of that kind, but {because}",
                hint="leave --via out",
            )

    def _catalog_candidates(self, ref: CatalogRef) -> Sequence[Candidate]:
        catalog = self._catalog or kept_catalog(self._settings)
        release = catalog.catalog.find(ref.name, ref.version)
        kinds = {"auto": ("hub", "torrent", "archive"), "http": ("hub", "archive"), "torrent": ("torrent",)}
        allowed = kinds[self._settings.via]
        channels = [channel for kind in allowed for channel in release.channels if channel.kind == kind]
        if not channels:
            offered = ", ".join(channel.kind for channel in release.channels)
            self._refuse_via(self._settings.via, f"{release.ref} is offered by: {offered}")
        return [_vouched_for(self._candidate(channel), channel, catalog) for channel in channels]

    def _candidate(self, channel: Channel) -> Candidate:
        if isinstance(channel, HubChannel):
            return Candidate(channel.kind, lambda: self._catalog_hub_offer(channel))
        if isinstance(channel, TorrentChannel):
            return Candidate(channel.kind, lambda: self._torrents.from_channel(channel))
        return archive_candidate(channel, self._archives, self._http_source, self._settings.min_assurance)

    def _hub_offer(self, ref: HubRef) -> Offer:
        manifest = hub_manifest(self._hub, ref.repo, ref.revision)
        return Offer("hub", f"hub-{manifest.info.version}", manifest, (self._http_source,))

    def _catalog_hub_offer(self, channel: HubChannel) -> Offer:
        if not channel.needs_listing:
            manifest = channel.manifest(self._hub.endpoint)
            if manifest.is_fully_pinned:
                return Offer("hub", f"hub-{channel.revision}", manifest, (self._http_source,))
        manifest = self._merge_live(channel)
        return Offer("hub", f"hub-{channel.revision}", manifest, (self._http_source,))

    def _merge_live(self, channel: HubChannel) -> Manifest:
        """Fill what the catalog does not pin from the hub's own listing; a pin is never replaced."""
        live = hub_manifest(self._hub, channel.repo, channel.revision, include=channel.include)
        missing = [path for path in channel.include if not _is_pattern(path) and path not in _paths(live)]
        if missing:
            raise UnknownModel(
                f"{channel.repo} does not hold {missing[0]} at {channel.revision[:12]}",
                detail="expected every file that the catalog names, got fewer",
                hint="another channel may have it: --via torrent",
            )
        entries = tuple(self._merge_entry(channel, entry) for entry in live.files if channel.wants(entry.path))
        return Manifest(entries, replace(channel.info, source_url=live.info.source_url))

    def _merge_entry(self, channel: HubChannel, live: FileEntry) -> FileEntry:
        pin = channel.pin(live.path)
        pinned = pin.entry()
        for claim in pin.unconfirmed:
            if isinstance(claim.value, Digest) and live.digest(claim.value.algorithm) not in {None, claim.value}:
                seen = live.digest(claim.value.algorithm)
                self._report(Notice(f"{live.path}: an unconfirmed record says {claim.value}; used is the hub's {seen}"))
        algorithms = {digest.algorithm for digest in pinned.digests}
        digests = (*pinned.digests, *(digest for digest in live.digests if digest.algorithm not in algorithms))
        size = pinned.size if pinned.size is not None else live.size
        return replace(live, size=size, digests=digests)

    def _manifest_offer(self, ref: ManifestRef) -> Offer:
        if ref.is_url:
            data, base = self._http.get_bytes(ref.location, MAX_METALINK_BYTES, stop=self._stop), ref.location
        else:
            data, base = read_local_file(ref.location), Path(ref.location).expanduser().absolute().as_uri()
        signed = self._authenticate(ref, data)
        manifest = self._with_sizes(self._judge(parse_metalink(data, base), signed, ref))
        sources = self.manifest_sources(manifest)
        if not sources and not self._may_adopt:
            raise UsageError(
                "the manifest names no source that may be used",
                detail=f"expected mirrors or torrents that --via {self._settings.via} allows, got none",
                hint="leave --via out, or put the manifest beside its files",
            )
        name = manifest.info.name or Path(urlsplit(ref.location).path).name.removesuffix(".meta4")
        manifest = replace(manifest, info=replace(manifest.info, name=name))
        scratch = self.state_directories
        identity = f"manifest-{hashlib.sha256(data).hexdigest()[:32]}"
        return Offer("manifest", identity, manifest, sources, scratch, signed=signed)

    def _authenticate(self, ref: ManifestRef, data: bytes) -> Signed | None:
        """Return the manifest as a pinned key's word, or None where no key is pinned. Nothing in it was read yet."""
        if not self._keys:
            return None
        if ref.is_url:
            bundle = fetch_signature(self._http, ref.location, self._stop)
        else:
            bundle = read_signature(Path(ref.location).expanduser())
        return authenticate_document(MANIFEST, data, bundle, self._keys, ref.key)

    def _judge(self, manifest: Manifest, signed: Signed | None, ref: ManifestRef) -> Manifest:
        if signed is not None:
            check_expiry(manifest.info.expires, now_utc(), MANIFEST, ref.key)
            return with_signed(manifest)
        if manifest.info.expires and now_utc() >= parse_utc(manifest.info.expires):
            self._report(Notice(f"the manifest says that it expired at {manifest.info.expires}; no key is pinned"))
        return manifest

    def _with_sizes(self, manifest: Manifest) -> Manifest:
        """Ask the mirrors for sizes that the manifest leaves out (RFC 5854 makes them optional)."""
        return manifest.with_files(
            entry if entry.size is not None else replace(entry, size=self._ask_size(entry)) for entry in manifest.files
        )

    def _ask_size(self, entry: FileEntry) -> int:
        reasons = []
        for mirror in entry.mirrors:
            if not _is_http(mirror):
                continue
            self._stop.check()
            try:
                if mirror.member:
                    return self._archives.locate(mirror.url, mirror.member).size
                answer = self._http.head(mirror.url, stop=self._stop)
            except (TransferError, AccessError) as error:
                reasons.append(f"{error.what}: {error.detail}")
                continue
            if answer.status == 200 and answer.content_length is not None:
                return answer.content_length
            reasons.append(f"{host_of(mirror.url)} answered {answer.status} without a length")
        raise UnsupportedFormat(
            f"the size of {entry.path} is not known",
            detail=f"expected it in the manifest or from a mirror, got: {'; '.join(reasons) or 'no mirror'}",
            hint="ask the publisher for a manifest with sizes",
        )

    def state_directories(self) -> Sequence[Path]:
        """Return where the torrents that were opened keep their own state."""
        return self._torrents.state_directories()

    def manifest_sources(self, manifest: Manifest) -> tuple[Callable[[], Source], ...]:
        """Return the mirrors and torrents that a manifest names, as far as the settings allow them.

        Where both can be used and every piece can be proved, they are one source: see ``docs/decisions/0007``.
        """
        via, shares = self._settings.via, self._settings.share
        has_mirrors = via != "torrent" and all(any(map(_is_http, entry.mirrors)) for entry in manifest.files)
        is_mixed = via == "auto" and not shares and has_mirrors and all(map(_proves_pieces, manifest.files))
        local = via != "torrent" and all(mirror_urls(entry, {"file"}) for entry in manifest.files)
        torrents = [] if via == "http" or is_mixed else self._torrents.sources_of(manifest)
        mirrors: list[Callable[[], Source]] = []
        if is_mixed:
            mirrors = [lambda: self._http_source(self._torrents.givers_of(manifest))]
        elif has_mirrors:
            mirrors = [self._http_source]
        # What comes from mirrors cannot be given on, so a node of a fleet asks the others first.
        ordered = [*torrents, *mirrors] if shares else [*mirrors, *torrents]
        return tuple([LocalSource, *ordered] if local else ordered)

    def linger(self, directory: Path) -> None:
        """Go on giving a model that came from a torrent to peers that lack it, if that was asked for."""
        self._torrents.linger(directory)

    def _http_source(self, givers: Sequence[PieceGiver] = ()) -> Source:
        return HttpSource(
            self._http, politeness=self._politeness, archives=self._archives, scores=self._scores, givers=givers
        )


def _proves_pieces(entry: FileEntry) -> bool:
    is_usable = entry.pieces is not None and MIN_PIECE_LENGTH <= entry.pieces.length <= MAX_PIECE_LENGTH
    return entry.sha256 is not None and (is_usable or not entry.size)


def _vouched_for(candidate: Candidate, channel: Channel, catalog: CatalogInForce) -> Candidate:
    """Return the candidate with the files marked whose sha256 stands in a signed catalog."""
    if catalog.signed is None:
        return candidate

    def open_offer() -> Offer:
        offer = candidate.open()
        files = () if isinstance(channel, ArchiveChannel) else channel.files
        pinned = {pin.path: pin.entry().sha256 for pin in files}
        manifest = with_signed(offer.manifest, lambda entry: pinned.get(entry.path) == entry.sha256)
        return replace(offer, manifest=manifest, signed=catalog.signed)

    return replace(candidate, open=open_offer)


def _is_http(mirror: MirrorUrl) -> bool:
    return scheme_of(mirror.url) in HTTP_SCHEMES


def _paths(manifest: Manifest) -> set[str]:
    return {entry.path for entry in manifest.files}


def _is_pattern(path: str) -> bool:
    return bool(set(path) & set("*?["))
