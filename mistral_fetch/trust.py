"""Which signed documents may be believed: bytes and remembered state in, a verdict out. No I/O, no clock, no library.

The documents are manifests and catalogs, the keys are those the user pinned. The rules:

1. Without a pinned key no signature is asked for, and one that is there proves nothing.
2. With pinned keys a document counts only if one of them signed exactly these bytes, as one document. Its name is not
   signed: what a document is about stands in the document.
3. The signature is checked before anything else in the document is looked at.
4. What the signature covers by sha256 is ``signed``; a weaker digest in a signed document stays what it is.
5. A document that says when it expires is refused from that moment on.
6. A catalog that has a version is compared with the highest version that the keys pinned today were seen to sign at
   this address, whichever of them it was: a lower one is refused, and so are other bytes under the same number.
   Where a version was seen, a catalog without one is refused.
7. What a key signed is forgotten when it is no longer pinned, or whoever stole it could shut an address for ever with
   a very high number.
8. References that cannot carry a signature (hubs, torrents, magnet links) are refused while keys are pinned. Names
   of the built-in catalog are not: it ships with the program, and is trusted as its code is.

What was accepted is remembered by :mod:`mistral_fetch.store.trust_state`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from mistral_fetch.errors import BadSignature, Expired, RolledBack, UnsignedManifest
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.ref import HubRef, MagnetRef, Ref, TorrentRef
from mistral_fetch.signatures import MAX_BUNDLE_BYTES, PublicKey, malformed_bundle, parse_bundle
from mistral_fetch.strict_json import UnexpectedJson
from mistral_fetch.units import parse_utc

MANIFEST, CATALOG = "manifest", "catalog"

CheckSignature = Callable[[bytes, bytes, PublicKey], bool]
"""Document, bundle and key to whether the key made the bundle over the document."""


@dataclass(frozen=True)
class Signed:
    """A document that a pinned key vouches for."""

    kind: str  # MANIFEST or CATALOG
    document: bytes
    bundle: bytes
    fingerprint: str

    @property
    def sha256(self) -> str:
        """Return the document's own sha256, in hexadecimal."""
        return hashlib.sha256(self.document).hexdigest()


@dataclass(frozen=True)
class SeenVersion:
    """The highest version that a key was seen to sign, and the sha256 of that document."""

    version: int
    sha256: str


Seen = Mapping[str, SeenVersion]
"""What was seen at one address, by the fingerprint of the key."""


def authenticate(
    kind: str,
    document: bytes,
    bundle: bytes | None,
    keys: Sequence[PublicKey],
    check: CheckSignature,
    where: str,
) -> Signed:
    """Return the document as one that a pinned key vouches for (rules 2 and 3).

    Args:
        kind: What the document is used as.
        document: Its bytes.
        bundle: The signature beside it; None where there is none.
        keys: The pinned keys, at least one.
        check: Does the cryptography.
        where: The document's address, for errors.

    Raises:
        UnsignedManifest: There is no signature.
        BadSignature: It is malformed, of other bytes, or by none of the keys.
    """
    if bundle is None:
        raise UnsignedManifest(
            f"the {kind} {where} is not signed",
            detail=f"expected {where}.sig by {_names(keys)}, got none",
            hint=f"ask the publisher for the signature; without it, {_UNPIN}",
        )
    if len(bundle) > MAX_BUNDLE_BYTES:
        raise malformed_bundle(where, UnexpectedJson("its size", f"at most {MAX_BUNDLE_BYTES} bytes", "more"))
    try:
        signature = parse_bundle(bundle)
    except UnexpectedJson as error:
        raise malformed_bundle(where, error) from None
    actual = hashlib.sha256(document).hexdigest()
    if signature.sha256 != actual:
        raise _bad(where, kind, f"expected sha256:{signature.sha256} as it was signed, got sha256:{actual}")
    named = [key for key in keys if key.hint == signature.hint]
    if not named:
        raise _bad(where, kind, f"expected a signature by {_names(keys)}, got one by another key")
    if not any(check(document, bundle, key) for key in named):
        raise _bad(where, kind, f"expected a signature by {_names(named)}, got one that this key did not make")
    return Signed(kind, document, bundle, named[0].fingerprint)


_UNPIN = "pin no key: --trust-key none"


def _names(keys: Iterable[PublicKey]) -> str:
    return " or ".join(f"the key {key.fingerprint[:16]}" for key in keys)


def _bad(where: str, kind: str, detail: str) -> BadSignature:
    return BadSignature(
        f"the {kind} {where} is not what a pinned key signed",
        detail=detail,
        hint="do not use it; fetch it again, or ask the publisher whether the key changed (docs/signatures.md)",
    )


def check_expiry(expires: str, now: datetime, kind: str, where: str) -> None:
    """Refuse a document whose time is over (rule 5); ``expires`` is empty where it never is.

    Raises:
        Expired: It is.
    """
    if expires and now >= parse_utc(expires):
        raise Expired(
            f"the {kind} {where} has expired",
            detail=f"expected one that holds at {now:%Y-%m-%dT%H:%M:%SZ}, got one that held until {expires}",
            hint="ask the publisher for a new one; if it is this machine's clock that is wrong, set that",
        )


def check_version(version: int | None, sha256: str, seen: Seen, keys: Sequence[PublicKey], where: str) -> None:
    """Refuse a catalog that is older than one of the same address seen before (rules 6 and 7).

    Raises:
        RolledBack: Its version is lower or missing, or the same version was another document.
    """
    pinned = [entry for fingerprint, entry in seen.items() if fingerprint in {key.fingerprint for key in keys}]
    highest = max(pinned, key=lambda entry: entry.version, default=None)
    if highest is None:
        return
    if version is None or version < highest.version:
        got = "one without a version" if version is None else f"version {version}"
        raise _rolled_back(where, f"expected version {highest.version} or later, which was seen before, got {got}")
    others = {entry.sha256 for entry in pinned if entry.version == version} - {sha256}
    if others:
        raise _rolled_back(where, f"expected version {version} as sha256:{others.pop()}, got sha256:{sha256}")


def _rolled_back(where: str, detail: str) -> RolledBack:
    return RolledBack(
        f"the catalog {where} was rolled back",
        detail=detail,
        hint="try again later, or another mirror of it; tell its publisher (docs/signatures.md)",
    )


def remember(seen: Seen, fingerprint: str, version: int | None, sha256: str) -> Seen:
    """Return what was seen, with an accepted catalog added. Numbers only rise."""
    known = seen.get(fingerprint)
    if version is None or (known is not None and known.version >= version):
        return seen
    return {**seen, fingerprint: SeenVersion(version, sha256)}


def refuse_unsignable(ref: Ref, keys: Sequence[object]) -> None:
    """Refuse what can carry no signature while keys are pinned (rule 8).

    Raises:
        UnsignedManifest: ``ref`` is of that kind.
    """
    if keys and isinstance(ref, HubRef | TorrentRef | MagnetRef):
        kind = {HubRef: "a hub repository", TorrentRef: "a torrent", MagnetRef: "a magnet link"}[type(ref)]
        raise UnsignedManifest(
            f"{ref.key} cannot be signed",
            detail=f"expected a signed manifest or a name from a catalog, because keys are pinned; got {kind}",
            hint=f"ask the publisher for a signed .meta4; without one, {_UNPIN}",
        )


def with_signed(manifest: Manifest, covered: Callable[[FileEntry], bool] = lambda _entry: True) -> Manifest:
    """Return the manifest with the files marked whose sha256 stands in a signed document (rule 4).

    Args:
        manifest: What is to be fetched.
        covered: Whether the document gives a file's sha256; in a signed manifest it gives each one that is known.
    """
    return manifest.with_files(
        replace(entry, is_signed=True) if entry.sha256 is not None and covered(entry) else entry
        for entry in manifest.files
    )


def confirm_same_files(promised: Sequence[FileEntry], held: Manifest, where: str, *, exactly: bool) -> None:
    """Check that a signed document speaks of the files that a model of the cache was verified against.

    Args:
        promised: The files in the document; those without a sha256 are compared by size.
        held: The model's own manifest.
        where: The model, for errors.
        exactly: The document lists all of the model's files.

    Raises:
        BadSignature: A file is missing, another one, or one too many.
    """
    actual = {entry.path: entry for entry in held.files}
    for entry in promised:
        found = actual.pop(entry.path, FileEntry(entry.path, None))
        if found.size is None or entry.size not in {None, found.size} or entry.sha256 not in {None, found.sha256}:
            raise _other_files(where, entry.path, f"expected {_described(entry)}, got {_described(found)}")
    if exactly and actual:
        raise _other_files(where, min(actual), "expected no such file, got one")


def _described(entry: FileEntry) -> str:
    return "none" if entry.size is None and not entry.sha256 else f"{entry.size} bytes with sha256:{entry.sha256}"


def _other_files(where: str, path: str, detail: str) -> BadSignature:
    return BadSignature(
        f"{path} in {where} is not what was signed",
        detail=detail,
        hint="somebody changed this cache: remove the model with mistral-fetch rm, and pull it again",
    )
