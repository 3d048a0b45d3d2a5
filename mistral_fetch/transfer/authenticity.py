"""The pinned keys, the signatures beside documents, and the signed papers of a snapshot: fetched, then judged by trust.

Owns where a signature lies (``.sig`` after the document's name, on the same channel) and what a name in the cache must
have for a pull to be content with it. The rules themselves are :mod:`mistral_fetch.trust`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from mistral_fetch.config import Settings
from mistral_fetch.errors import (
    BadSignature,
    ConfigError,
    MirrorStatus,
    NotAModelFile,
    NotFoundError,
    StoreError,
    UnsignedManifest,
)
from mistral_fetch.signatures import (
    BUNDLE_SUFFIX,
    MAX_BUNDLE_BYTES,
    MAX_KEY_BYTES,
    PublicKey,
    is_signed_by,
    parse_public_key,
)
from mistral_fetch.trust import CATALOG, MANIFEST, Signed, authenticate, confirm_same_files

if TYPE_CHECKING:
    from mistral_fetch.catalog import Catalog
    from mistral_fetch.manifest import FileEntry, Manifest
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.sources.http_client import HttpClient


def pinned_keys(settings: Settings) -> tuple[PublicKey, ...]:
    """Return the public keys that the settings pin.

    Raises:
        ConfigError: A file cannot be read, or holds no such key.
    """
    return tuple(dict.fromkeys(_load_key(path) for path in settings.trust_keys))


def _load_key(path: str) -> PublicKey:
    try:
        with Path(path).open("rb") as file:
            return parse_public_key(file.read(MAX_KEY_BYTES + 1), path)
    except OSError as error:
        raise ConfigError(
            f"the pinned key {path} cannot be read",
            detail=f"expected a PEM file with a public key, got: {error.strerror or error}",
            hint="correct --trust-key or MISTRAL_FETCH_TRUST_KEYS; without it nothing can be trusted",
        ) from error


def now_utc() -> datetime:
    """Return the time by this machine's clock, which is the only one there is."""
    return datetime.now(timezone.utc)


def authenticate_document(
    kind: str, document: bytes, bundle: bytes | None, keys: Sequence[PublicKey], where: str
) -> Signed:
    """Return a document as one that a pinned key vouches for; see :func:`mistral_fetch.trust.authenticate`."""
    return authenticate(kind, document, bundle, keys, is_signed_by, where)


def signature_url(url: str) -> str:
    """Return where the signature of a document on a server lies; a query (a token) is kept."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path + BUNDLE_SUFFIX))


def fetch_signature(http: HttpClient, url: str, stop: StopSignal) -> bytes | None:
    """Return the signature beside a document on a server, or None where the server has none.

    Raises:
        BadSignature: What lies there is too large.
        AccessError, MirrorError, OfflineRefused: The server does not say whether there is one.
    """
    address = signature_url(url)
    try:
        return http.get_bytes(address, MAX_BUNDLE_BYTES, stop=stop)
    except MirrorStatus as error:
        if error.status in {404, 410}:
            return None
        raise
    except NotAModelFile as error:
        raise BadSignature(
            "what should be a signature is too large to be one",
            detail=f"{error.what}: {error.detail}",
            hint="do not use the document beside it; tell its publisher",
        ) from error


def read_signature(path: Path) -> bytes | None:
    """Return the signature beside a document on this disk, or None where there is none; one byte too many is kept."""
    try:
        with path.with_name(path.name + BUNDLE_SUFFIX).open("rb") as file:
            return file.read(MAX_BUNDLE_BYTES + 1)
    except OSError:
        return None


def is_vouched_for(papers: Mapping[str, Any], channel: str, settings: Settings) -> bool:
    """Return whether a snapshot's papers satisfy the pinned keys. Nothing is checked again: the cache is believed.

    A name of the built-in catalog needs no signature; see the rules in :mod:`mistral_fetch.trust`. Where a bundle
    brought the files, it is the catalog's only if that has the sha256 of each one.
    """
    if not settings.trust_keys:
        return True
    if channel != MANIFEST and not settings.catalog and ("carried_by" not in papers or _is_pinned(papers, channel)):
        return True
    record = papers.get("signature")
    if not isinstance(record, Mapping):
        return False
    # A catalog may vouch for a few files only, so it says nothing about a manifest.
    kinds = {MANIFEST} if channel == MANIFEST else {MANIFEST, CATALOG}
    pinned = {f"sha256:{key.fingerprint}" for key in pinned_keys(settings)}
    return record.get("kind") in kinds and record.get("key") in pinned


def _is_pinned(papers: Mapping[str, Any], channel: str) -> bool:
    from mistral_fetch.catalog import load_catalog

    pins = catalog_pins(load_catalog(), str(papers.get("ref", "")), channel) or []
    pinned = {(pin.path, pin.sha256) for pin in pins}
    files = papers.get("files")
    return isinstance(files, list) and all((file.get("path"), file.get("sha256")) in pinned for file in files)


def catalog_pins(catalog: Catalog, ref: str, channel: str) -> list[FileEntry] | None:
    """Return what a catalog pins of a model that came by a channel; None where it does not have that."""
    name, _, version = ref.partition("@")
    try:
        found = catalog.find(name, version or None).channel(channel)
    except NotFoundError:
        return None
    return None if found is None else [pin.entry() for pin in getattr(found, "files", ())]


def check_papers(
    directory: Path, papers: Mapping[str, Any], held: Manifest, keys: Sequence[PublicKey], name: str
) -> Signed:
    """Check offline that a pinned key signed what a snapshot was made from, and return that document.

    Raises:
        UnsignedManifest: The snapshot has no signature.
        BadSignature: It is not by a pinned key, or the files are not those that were signed.
    """
    from mistral_fetch.store.snapshots import load_signed

    try:
        stored = load_signed(directory, papers)
    except StoreError as error:
        raise BadSignature(
            f"the signature of {name} in this cache is damaged",
            detail=error.detail,
            hint=f"get it anew with: mistral-fetch repair {name}",
        ) from error
    if stored is None:
        raise UnsignedManifest(
            f"{name} has no signature in this cache",
            detail="expected what it was pulled by to be signed, got no signature",
            hint="pull it again from a signed manifest, with --trust-key",
        )
    signed = authenticate_document(stored.kind, stored.document, stored.bundle, keys, f"of {name}")
    confirm_same_files(_promised(signed, papers), held, name, exactly=signed.kind == MANIFEST)
    return signed


def _promised(signed: Signed, papers: Mapping[str, Any]) -> list[FileEntry]:
    if signed.kind == MANIFEST:
        from mistral_fetch.metalink import parse_metalink

        return list(parse_metalink(signed.document).files)
    from mistral_fetch.catalog import parse_catalog

    pins = catalog_pins(parse_catalog(signed.document), str(papers.get("ref", "")), str(papers.get("channel", "")))
    # An archive, or a torrent, may hold more or fewer files than are pinned.
    held = {str(file.get("path")) for file in papers.get("files", []) if isinstance(file, dict)}
    return [pin for pin in pins or () if pin.path in held]
