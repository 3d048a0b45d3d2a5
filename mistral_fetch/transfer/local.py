"""What the cache already has for a reference, found without any network and without importing any of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.catalog import Catalog, load_catalog
from mistral_fetch.config import Settings
from mistral_fetch.errors import NotFoundError, NotInCache, StoreError, UsageError
from mistral_fetch.ref import CatalogRef, DirectoryRef, ManifestRef, Ref, TorrentRef, parse_ref
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import RefRecord, find_refs, find_snapshot

MAX_LOCAL_FILE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class LocalModel:
    """A complete snapshot, and the record that led to it."""

    directory: Path
    record: RefRecord


def settings_catalog(settings: Settings) -> Catalog:
    """Return the built-in catalog, or the one the settings name; of one on a server the copy that is here.

    Raises:
        ConfigError: The named file cannot be read.
        NotInCache: The catalog on the server was not fetched yet.
        MalformedManifest: It is not a catalog.
        TrustError: No pinned key vouches for it.
    """
    if not settings.catalog:
        return load_catalog()
    from mistral_fetch.transfer.catalogs import kept_catalog

    return kept_catalog(settings).catalog


def ref_key(ref: Ref, settings: Settings, catalog: Catalog | None = None) -> str:
    """Return the name a reference has in this cache: resolved names with their version, files by content.

    Args:
        ref: What was typed.
        settings: Which catalog names are looked up in.
        catalog: That catalog, where it was just fetched.

    Raises:
        UnknownModel: The catalog has no such name.
        NotFoundError: A named local file does not exist.
        UsageError: A directory was named where a model is fetched.
    """
    if isinstance(ref, CatalogRef):
        return (catalog or settings_catalog(settings)).find(ref.name, ref.version).ref
    if isinstance(ref, ManifestRef | TorrentRef) and not ref.is_url:
        # The file may be replaced by another under the same name, so the name alone does not tell.
        data = read_local_file(ref.location)
        return f"{Path(ref.location).name}#{hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(ref, DirectoryRef):
        raise UsageError(
            f"{ref.path} is a directory, not a model to fetch",
            detail="expected a catalog name, hf:org/repo, a manifest, a torrent or a magnet link",
            hint="run, chat, verify and publish take directories; pull does not",
        )
    return ref.key


def read_local_file(location: str) -> bytes:
    """Return a manifest or torrent file's bytes, bounded.

    Raises:
        NotFoundError: There is no such file, or it cannot be read.
    """
    try:
        with Path(location).expanduser().open("rb") as file:
            data = file.read(MAX_LOCAL_FILE_BYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:  # no such file, no such ~user, no possible name
        raise NotFoundError(
            f"cannot read {location}",
            detail=f"expected a readable file, got: {getattr(error, 'strerror', None) or error}",
            hint="check the path",
        ) from error
    if len(data) > MAX_LOCAL_FILE_BYTES:
        raise UsageError(
            f"{location} is too large to be a manifest or a torrent",
            detail=f"expected at most {MAX_LOCAL_FILE_BYTES} bytes",
            hint="name the .meta4 or .torrent file, not the model itself",
        )
    return data


def acceptable_refs(layout: Layout, key: str, via: str) -> list[RefRecord]:
    """Return what a name stands for by the channels that ``--via`` allows, the newest pull first."""
    refused = {"http": {"torrent"}, "torrent": {"hub", "archive"}}.get(via, set())
    return [record for record in find_refs(layout, key) if record.channel not in refused]


def find_local(layout: Layout, key: str, via: str, shared_homes: Sequence[Path] = ()) -> LocalModel | None:
    """Return the newest complete snapshot of a ref that came by an acceptable channel.

    The cache itself comes first, then caches that are only read, in their order.
    """
    layout.check_version()
    for place in (layout, *readable_layouts(shared_homes)):
        for record in acceptable_refs(place, key, via):
            directory = find_snapshot(place, record.content_digest)
            if directory is not None:
                return LocalModel(directory, record)
    return None


def readable_layouts(shared_homes: Sequence[Path]) -> list[Layout]:
    """Return the shared caches that this version can read; one that is not there today is nobody's mistake."""
    found = []
    for layout in map(Layout, shared_homes):
        with suppress(StoreError):
            layout.check_version()
            found.append(layout)
    return found


def local_key(layout: Layout, text: str, settings: Settings) -> str:
    """Return the key of what a person typed: a reference, or a key exactly as ``list`` prints it.

    Raises:
        UsageError, UnknownModel, NotFoundError: It is neither.
    """
    layout.check_version()
    places = (layout, *readable_layouts(settings.shared_homes))
    return text if any(find_refs(place, text) for place in places) else ref_key(parse_ref(text), settings)


def require_local(layout: Layout, text: str, settings: Settings) -> LocalModel:
    """Return the complete snapshot of what a person typed.

    Raises:
        NotInCache: It is not (completely) there.
    """
    found = find_local(layout, local_key(layout, text, settings), settings.via, settings.shared_homes)
    if found is None:
        raise NotInCache(
            f"{text} is not complete in the cache at {layout.home}",
            detail="expected a complete snapshot, got none",
            hint=f"fetch it with: mistral-fetch pull {text}",
        )
    return found
