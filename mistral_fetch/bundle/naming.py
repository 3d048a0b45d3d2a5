"""Which names a bundle may give: those that a pull by the same channel could have led to. Pure text work."""

from __future__ import annotations

import re

from mistral_fetch.bundle.contents import ModelRecord, malformed
from mistral_fetch.errors import UsageError
from mistral_fetch.ref import CatalogRef, HubRef, ManifestRef, TorrentRef, parse_ref
from mistral_fetch.trust import MANIFEST

# What the cache calls models of local files: the file's name, and the beginning of its sha256.
_OF_FILE = re.compile(r"[^/]+\.(meta4|torrent)#([0-9a-f]{16})", re.IGNORECASE)
_MAGNET = re.compile(r"magnet:(btih:[0-9a-f]{40}|btmh:[0-9a-f]{64})")
_KINDS = {"meta4": "manifest", "torrent": "torrent"}


def check_name(record: ModelRecord) -> None:
    """Check that a model's name, its channel and what was signed go together.

    Otherwise a bundle could give any files a name whose own rules it would escape: a catalog's name by a manifest, or
    another manifest's name with a document that was signed for this one.

    Raises:
        MalformedBundle: They do not.
    """
    channels = _channels(record.ref)
    if record.channel not in channels:
        told = " or ".join(sorted(channels)) or "a name that a pull can lead to"
        raise malformed(f"expected {told} for {record.ref}, got {record.channel}")
    if record.signed_as and (record.signed_as == MANIFEST) != (record.channel == MANIFEST):
        raise malformed(f"expected what was signed to fit the channel {record.channel}, got a {record.signed_as}")
    of_file = _OF_FILE.fullmatch(record.ref)
    if record.signed_as == MANIFEST and of_file is not None:
        sha256 = next(d.sha256 for d in record.documents if d.path == f".signed/{d.sha256}")
        if not sha256.startswith(of_file[2]):
            raise malformed(f"expected the signed manifest that {record.ref} is called after, got sha256:{sha256}")


def is_catalog_name(ref: str) -> bool:
    """Return whether a name is one that a catalog gives."""
    try:
        return isinstance(parse_ref(ref), CatalogRef)
    except UsageError:
        return False


def _channels(ref: str) -> set[str]:
    if of_file := _OF_FILE.fullmatch(ref):
        return {_KINDS[of_file[1].lower()]}
    if _MAGNET.fullmatch(ref):
        return {"torrent"}
    try:
        parsed = parse_ref(ref)
    except UsageError:
        return set()
    if isinstance(parsed, CatalogRef):
        return {"hub", "torrent", "archive"}
    if isinstance(parsed, HubRef):
        return {"hub"}
    if isinstance(parsed, ManifestRef | TorrentRef) and parsed.is_url:
        return {"manifest" if isinstance(parsed, ManifestRef) else "torrent"}
    return set()
