"""Whether the models in a bundle may have the names it gives them: pinned keys, the catalog's pins, what is here.

A bundle is carried by hand, so nobody but the carrier vouches for what it calls its models. The rules are those of a
pull: :mod:`mistral_fetch.trust` judges what was signed, and the catalog in force knows its own names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from mistral_fetch.bundle.contents import CHANNELS, malformed
from mistral_fetch.bundle.naming import check_name, is_catalog_name
from mistral_fetch.bundle.reader import BundledModel
from mistral_fetch.catalog import parse_catalog
from mistral_fetch.config import Settings
from mistral_fetch.errors import BadSignature, Conflict, NotFoundError, TrustError, UnsignedManifest
from mistral_fetch.events import Notice, Report
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.metalink import parse_metalink
from mistral_fetch.ref import location_key
from mistral_fetch.signatures import PublicKey
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import find_refs, find_snapshot
from mistral_fetch.store.trust_state import load_record
from mistral_fetch.transfer.authenticity import authenticate_document, catalog_pins, now_utc, pinned_keys
from mistral_fetch.transfer.local import settings_catalog
from mistral_fetch.trust import CATALOG, MANIFEST, Signed, check_expiry, check_version, confirm_same_files, with_signed


@dataclass(frozen=True)
class Vouched:
    """A model's manifest with the files marked that a pinned key signed, and what it signed."""

    manifest: Manifest
    signed: Signed | None


def vouch_for(model: BundledModel, settings: Settings, report: Report) -> Vouched:
    """Decide whether a bundled model may be believed, before a byte of its files is read.

    Raises:
        MalformedBundle: No pull could have given it that name.
        UnsignedManifest: Keys are pinned, and neither a signature nor the built-in catalog speaks for it.
        BadSignature: Its signature is not by a pinned key, of other files, or the catalog has other files.
        Expired, RolledBack: What was signed is over, or older than what was seen.
    """
    check_name(model.record)
    keys = pinned_keys(settings)
    signed = _authenticate(model, keys) if keys and model.record.signed_as else None
    manifest = model.manifest
    if signed is not None:
        covered = {entry.path for entry in _judge(model, signed, keys, settings) if entry.sha256}
        manifest = with_signed(manifest, lambda entry: entry.path in covered)
    unpinned = _check_pins(model, settings, report)
    is_vouched = signed is not None or (not settings.catalog and unpinned == [])
    if keys and not is_vouched:
        raise UnsignedManifest(
            f"nobody who is trusted vouches for {model.record.ref} in the bundle",
            detail="expected a pinned key's signature, or files that the built-in catalog pins, got neither",
            hint="make the bundle from a model that was pulled with that key; without one: --trust-key none",
        )
    return Vouched(manifest, signed)


def refuse_other_model(layout: Layout, model: BundledModel, *, replace_names: bool) -> None:
    """Refuse to let a name stand for other files than it does, unless that is wanted.

    Raises:
        Conflict: A complete model of this cache has the name, and is another one.
    """
    record = model.record
    for known in find_refs(layout, record.ref):
        is_other = known.channel == record.channel and known.content_digest != record.content_digest
        if is_other and not replace_names and find_snapshot(layout, known.content_digest):
            raise Conflict(
                f"{record.ref} is another model in this cache",
                detail=f"expected {known.content_digest} in the bundle, got {record.content_digest}",
                hint="let the name stand for the bundle's model with --replace",
            )


def _authenticate(model: BundledModel, keys: tuple[PublicKey, ...]) -> Signed:
    path = next(path for path in model.documents if path.startswith(".signed/") and not path.endswith(".sig"))
    document, bundle = model.documents[path], model.documents[f"{path}.sig"]
    return authenticate_document(model.record.signed_as, document, bundle, keys, f"of {model.record.ref}")


def _judge(
    model: BundledModel, signed: Signed, keys: tuple[PublicKey, ...], settings: Settings
) -> tuple[FileEntry, ...]:
    """Return what a signed document says of the model's files; it must be about them, and in force."""
    where = f"of {model.record.ref}"
    if signed.kind == MANIFEST:
        promised = parse_metalink(signed.document)
        check_expiry(promised.info.expires, now_utc(), MANIFEST, where)
        _confirm(promised.files, model, exactly=True)
        return promised.files
    catalog = parse_catalog(signed.document)
    check_expiry(catalog.expires, now_utc(), CATALOG, where)
    if settings.catalog:
        address = location_key(settings.catalog)
        seen = load_record(Layout(settings.home), address).seen
        check_version(catalog.version, hashlib.sha256(signed.document).hexdigest(), seen, keys, address)
    pins = catalog_pins(catalog, model.record.ref, model.record.channel)
    if pins is None:
        raise _not_in_catalog(model)
    held = {entry.path for entry in model.manifest.files}
    pinned = tuple(entry for entry in pins if entry.path in held)
    _confirm(pinned, model, exactly=False)
    return pinned


def _confirm(promised: Sequence[FileEntry], model: BundledModel, *, exactly: bool) -> None:
    try:
        confirm_same_files(promised, model.manifest, f"{model.record.ref} of the bundle", exactly=exactly)
    except BadSignature as error:
        hint = "do not use this bundle, whoever gave it to you: it has another file under this name"
        raise BadSignature(error.what, detail=error.detail, hint=hint) from error


def _check_pins(model: BundledModel, settings: Settings, report: Report) -> list[str] | None:
    """Compare a catalog name's files with the catalog; return those it does not pin, None where it lacks the name.

    Raises:
        BadSignature: A file is another one than the catalog pins.
        MalformedBundle: The catalog has the release, but not by that channel.
    """
    try:
        catalog = settings_catalog(settings)
    except (NotFoundError, TrustError):  # of one on a server no copy is here, or none that may be believed
        return None
    ref, channel = model.record.ref, model.record.channel
    if not is_catalog_name(ref):
        return None
    pins = catalog_pins(catalog, ref, channel)
    if pins is None and any(catalog_pins(catalog, ref, other) is not None for other in CHANNELS):
        raise malformed(f"expected {ref} by a channel that the catalog has, got it by {channel}")
    if pins is None:
        report(Notice(f"{ref}: no such release in the catalog in force; the bundle's word is taken"))
        return None
    known = {entry.path: entry for entry in pins}
    held = {entry.path for entry in model.manifest.files}
    pinned = [entry for entry in pins if entry.path in held]
    _confirm(pinned, model, exactly=False)
    unpinned = [e.path for e in model.manifest.files if e.path not in known or not known[e.path].sha256]
    if unpinned:
        report(
            Notice(f"{model.record.ref}: the catalog has no sha256 of {', '.join(unpinned[:3])}; the bundle's is taken")
        )
    return unpinned


def _not_in_catalog(model: BundledModel) -> BadSignature:
    return BadSignature(
        f"the signed catalog of {model.record.ref} does not have it",
        detail=f"expected a release of that name by {model.record.channel}, got none",
        hint="do not use this bundle; make another from a model that was pulled with that catalog",
    )
