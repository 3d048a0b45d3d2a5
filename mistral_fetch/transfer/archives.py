"""The offer of a catalog's archive channel: a remote tar becomes a manifest whose files are ranges of it."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Collection
from dataclasses import replace

from mistral_fetch.catalog_values import ArchiveChannel
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import AssuranceTooLow
from mistral_fetch.manifest import FileEntry, Manifest, MirrorUrl, ModelInfo
from mistral_fetch.sources.archive import ArchiveSource
from mistral_fetch.sources.base import Source
from mistral_fetch.sources.hub_choice import weight_format
from mistral_fetch.sources.tar_index import TarIndex
from mistral_fetch.sources.urls import public_url
from mistral_fetch.transfer.offer import Candidate, Offer


def archive_candidate(
    channel: ArchiveChannel, index: TarIndex, http_source: Callable[[], Source], floor: Assurance
) -> Candidate:
    """Return the archive as a way to get the release; excluded where less than ``floor`` vouches for it."""
    excluded = _too_low(channel, floor) if channel.assurance < floor else None
    return Candidate("archive", lambda: archive_offer(channel, index, http_source), excluded)


def archive_offer(channel: ArchiveChannel, index: TarIndex, http_source: Callable[[], Source]) -> Offer:
    """Return what an archive holds, read from its headers alone.

    Raises:
        ManifestError: It is no uncompressed tar of plain files with safe names.
        TransferError, AccessError, Interrupted: Its headers cannot be had.
    """
    url, digest = channel.url.value, channel.digest
    manifest = _manifest(channel, index)
    if digest is not None:
        identity = f"archive-{digest.algorithm}-{digest.value}"
    else:
        identity = f"archive-url-{hashlib.sha256(public_url(url).encode()).hexdigest()[:32]}"
    return Offer("archive", identity, manifest, (lambda: ArchiveSource(http_source(), index, url, digest),))


def _manifest(channel: ArchiveChannel, index: TarIndex) -> Manifest:
    url = channel.url.value
    members = index.members(url)
    top = _common_folder([member.path for member in members])
    entries = tuple(
        FileEntry(member.path.removeprefix(top), member.size, mirrors=(MirrorUrl(url, member=member.path),))
        for member in members
    )
    return Manifest(entries, _info(channel, [entry.path for entry in entries]))


def _common_folder(paths: Collection[str]) -> str:
    """Return the folder that holds all files, with a slash at its end, or '' if that is the archive itself."""
    folder = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return f"{folder}/" if folder else ""


def _info(channel: ArchiveChannel, paths: Collection[str]) -> ModelInfo:
    if channel.info.weight_format != "archive":
        return channel.info
    return replace(channel.info, weight_format=weight_format(paths))  # nobody said before what is inside


def _too_low(channel: ArchiveChannel, floor: Assurance) -> AssuranceTooLow:
    reached = channel.assurance
    worth = "an MD5 shows damage, not tampering" if reached is Assurance.MD5 else "only its length can be compared"
    return AssuranceTooLow(
        f"the tar archive of {channel.info.name} {channel.info.version} was not asked: too little vouches for it",
        detail=f"expected at least {floor.label}, got {reached.label} for {channel.url.value}: {worth}",
        hint=f"to accept that knowingly, add --min-assurance {reached.label}",
    )
