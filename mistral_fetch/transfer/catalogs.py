"""Which catalog is in force: the built-in one, a file, or what lies at an address; signed where keys are pinned.

``kept_catalog`` never asks the network, so that a complete model is found without it; ``current_catalog`` does. Both
end in the same rules (:mod:`mistral_fetch.trust`) and the same memory (:mod:`mistral_fetch.store.trust_state`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_fetch.catalog import MAX_CATALOG_BYTES, Catalog, load_catalog, parse_catalog
from mistral_fetch.config import Settings
from mistral_fetch.errors import ConfigError, NotInCache, TransferError, UnsignedManifest
from mistral_fetch.events import Notice, Report
from mistral_fetch.ref import CatalogRef, Ref, location_key
from mistral_fetch.signatures import PublicKey
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.trust_state import (
    TrustRecord,
    change_record,
    forget_other_copies,
    keep_copy,
    load_copy,
    load_record,
)
from mistral_fetch.transfer.authenticity import (
    authenticate_document,
    fetch_signature,
    now_utc,
    pinned_keys,
    read_signature,
)
from mistral_fetch.trust import CATALOG, Signed, check_expiry, check_version, remember

if TYPE_CHECKING:
    from mistral_fetch.sources.base import StopSignal


@dataclass(frozen=True)
class CatalogInForce:
    """A catalog, and the pinned key's word for it; None where no key is pinned, and for the built-in one."""

    catalog: Catalog
    signed: Signed | None = None


def is_remote(settings: Settings) -> bool:
    """Return whether the catalog lies on a server."""
    return "://" in settings.catalog


def names_remote_catalog(ref: Ref, settings: Settings) -> bool:
    """Return whether only a catalog on a server can say what ``ref`` means."""
    return isinstance(ref, CatalogRef) and is_remote(settings)


def kept_catalog(settings: Settings) -> CatalogInForce:
    """Return the catalog without asking the network: of one on a server, the copy that was accepted last.

    Raises:
        ConfigError: The file that the settings name cannot be read.
        NotInCache: The catalog on the server was not fetched yet.
        MalformedManifest: It is not a catalog.
        TrustError: No pinned key vouches for it, or not any more.
    """
    if not settings.catalog:
        return CatalogInForce(load_catalog())
    return _kept_copy(settings) if is_remote(settings) else _local_file(settings, believes=True)


def current_catalog(settings: Settings, report: Report, stop: StopSignal, *, keeps: bool = True) -> CatalogInForce:
    """Return the catalog as its publisher offers it now; without a network, the last one that was accepted.

    Args:
        settings: Which catalog, which keys, and how to reach servers.
        report: Told when the last one had to do.
        stop: Asked while the network is waited for.
        keeps: Keep a copy, and remember its version; false for a question that must change nothing.

    Raises:
        TrustError: No pinned key vouches for it, it is older than one seen before, or it has expired.
        TransferError: It cannot be had, nor is there a copy of it.
        NotInCache, ConfigError, MalformedManifest: As for :func:`kept_catalog`.
    """
    if not is_remote(settings):
        return _local_file(settings, believes=False) if settings.catalog else kept_catalog(settings)
    if settings.offline:
        return kept_catalog(settings)
    try:
        document, bundle = _fetch(settings, stop)
    except TransferError as error:
        return _instead_of(error, settings, report)
    return _accept(settings, document, bundle, keeps=keeps)


def _instead_of(error: TransferError, settings: Settings, report: Report) -> CatalogInForce:
    try:
        kept = kept_catalog(settings)
    except NotInCache:
        raise error from None
    report(Notice(f"{error.what}; the catalog that was accepted last is used"))
    return kept


def _fetch(settings: Settings, stop: StopSignal) -> tuple[bytes, bytes | None]:
    from mistral_fetch.sources.http_client import HttpClient
    from mistral_fetch.transfer.network import http_settings

    http = HttpClient(http_settings(settings))
    try:
        document = http.get_bytes(settings.catalog, MAX_CATALOG_BYTES, stop=stop)
        return document, fetch_signature(http, settings.catalog, stop) if settings.trust_keys else None
    finally:
        http.close()


def _local_file(settings: Settings, *, believes: bool) -> CatalogInForce:
    """Return the catalog in a file; if this cache is believed, what it accepted before is not authenticated again."""
    try:
        path = Path(settings.catalog).expanduser()
        with path.open("rb") as file:
            document = file.read(MAX_CATALOG_BYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:  # no such file, no such ~user, no possible name
        raise ConfigError(
            f"the catalog {settings.catalog} cannot be read",
            detail=f"expected a readable file, got: {getattr(error, 'strerror', None) or error}",
            hint="correct MISTRAL_FETCH_CATALOG, or unset it to use the built-in catalog",
        ) from error
    return (believes and _accepted_before(settings, document)) or _accept(
        settings, document, read_signature(path), keeps=True
    )


def _accepted_before(settings: Settings, document: bytes) -> CatalogInForce | None:
    layout, address, keys = Layout(settings.home), location_key(settings.catalog), pinned_keys(settings)
    record = load_record(layout, address)
    is_same = record.accepted == hashlib.sha256(document).hexdigest()
    if not is_same or record.fingerprint not in {key.fingerprint for key in keys}:
        return None
    catalog = parse_catalog(document)
    _judge(catalog, document, record, keys, address)
    return CatalogInForce(catalog)


def _kept_copy(settings: Settings) -> CatalogInForce:
    layout, address = Layout(settings.home), location_key(settings.catalog)
    record = load_record(layout, address)
    copy = load_copy(layout, address, record)
    if copy is None:
        raise NotInCache(
            f"the catalog {address} was not fetched yet",
            detail=f"expected a copy in the cache at {settings.home}, got none",
            hint="fetch it with: mistral-fetch list --catalog",
        )
    document, bundle = copy
    keys = pinned_keys(settings)
    if not keys:
        return CatalogInForce(parse_catalog(document))
    # Its signature was checked when it was accepted; this cache is believed about that.
    if bundle is None or record.fingerprint not in {key.fingerprint for key in keys}:
        raise UnsignedManifest(
            f"the copy of the catalog {address} was not signed by a pinned key",
            detail="expected one that was accepted with a key that is pinned now, got another",
            hint="fetch it again with: mistral-fetch list --catalog",
        )
    catalog = parse_catalog(document)
    _judge(catalog, document, record, keys, address)
    return CatalogInForce(catalog, Signed(CATALOG, document, bundle, record.fingerprint))


def _accept(settings: Settings, document: bytes, bundle: bytes | None, *, keeps: bool) -> CatalogInForce:
    """Judge a catalog that is not known yet, and remember it."""
    layout, address, keys = Layout(settings.home), location_key(settings.catalog), pinned_keys(settings)
    signed = authenticate_document(CATALOG, document, bundle, keys, address) if keys else None
    catalog = parse_catalog(document)
    if signed is not None:
        _judge(catalog, document, load_record(layout, address), keys, address)
    if keeps and (signed is not None or is_remote(settings)):
        layout.prepare()
        if is_remote(settings):
            keep_copy(layout, address, document, bundle if signed else None)

        def accepted(record: TrustRecord) -> TrustRecord:
            sha256 = hashlib.sha256(document).hexdigest()
            if signed is None:
                return replace(record, accepted=sha256, fingerprint="")
            # Again: another process may have seen a newer one since.
            _judge(catalog, document, record, keys, address)
            seen = remember(record.seen, signed.fingerprint, catalog.version, sha256)
            return TrustRecord(seen, sha256, signed.fingerprint)

        record = change_record(layout, address, accepted)
        forget_other_copies(layout, address, record)
    return CatalogInForce(catalog, signed)


def _judge(catalog: Catalog, document: bytes, record: TrustRecord, keys: Sequence[PublicKey], address: str) -> None:
    check_expiry(catalog.expires, now_utc(), CATALOG, address)
    check_version(catalog.version, hashlib.sha256(document).hexdigest(), record.seen, keys, address)
