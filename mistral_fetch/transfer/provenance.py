"""Where a model came from and what vouches for it: collected during a transfer, written beside the files. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.events import BytesReceived, Event, Report
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.sources.urls import public_url
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.snapshots import FROM_CACHE
from mistral_fetch.transfer.offer import Offer
from mistral_fetch.trust import Signed
from mistral_fetch.version import __version__


@dataclass(frozen=True)
class Delivered:
    """A file that is now a blob: what was promised of it, what it is, and what proved it."""

    entry: FileEntry
    blob: CommittedBlob
    assurance: Assurance


class Ledger:
    """Passes events on and remembers who sent what."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.sources: dict[str, set[str]] = {}
        self.received_bytes = 0

    def report(self, event: Event) -> None:
        """Take one event in, and pass it on."""
        if isinstance(event, BytesReceived):
            self.sources.setdefault(event.path, set()).add(event.source)
            self.received_bytes += event.length
        self._report(event)

    def credit(self, path: str, source: str) -> None:
        """Remember where bytes came from that were here already: named like a sender's, but not received."""
        self.sources.setdefault(path, set()).add(source)

    def forget_senders(self, path: str) -> list[str]:
        """Return who sent the bytes of a file that are about to be discarded, and count them no longer."""
        return sorted(self.sources.pop(path, ()))


def pin_manifest(manifest: Manifest, delivered: Sequence[Delivered]) -> Manifest:
    """Return the manifest with our own full digests in it (integrity rule 8), its addresses without secrets."""
    entries = []
    for file in delivered:
        others = tuple(digest for digest in file.entry.checks if digest.algorithm != "sha256")
        digests = (Digest("sha256", file.blob.sha256), *others)
        pieces = file.blob.pieces if file.blob.pieces.length else None
        mirrors = tuple(replace(mirror, url=public_url(mirror.url)) for mirror in file.entry.mirrors)
        links = tuple(replace(link, url=public_url(link.url)) for link in file.entry.torrents)
        entries.append(replace(file.entry, digests=digests, pieces=pieces, mirrors=mirrors, torrents=links))
    return manifest.with_files(entries)


def describe_provenance(
    manifest: Manifest,
    offer: Offer,
    ref_key: str,
    delivered: Sequence[Delivered],
    sources: Mapping[str, set[str]],
) -> dict[str, Any]:
    """Return the content of ``PROVENANCE.json`` (``docs/store-format.md``)."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    info = manifest.info
    files = [
        {
            "path": file.entry.path,
            "size": file.blob.size,
            "sha256": file.blob.sha256,
            "assurance": file.assurance.label,
            "promised": [str(digest) for digest in file.entry.digests],
            "sources": sorted(sources.get(file.entry.path, {FROM_CACHE})),
            "verified_at": now,
        }
        for file in delivered
    ]
    return {
        "schema": 1,
        "ref": ref_key,
        "channel": offer.channel,
        "identity": offer.identity,
        **({"carried_by": offer.carried_by} if offer.carried_by else {}),
        "name": info.name,
        "version": info.version,
        "licence": info.licence,
        "credit": info.credit,
        "source_url": public_url(info.source_url),
        "weight_format": info.weight_format,
        **_chat_template(info.chat_template),
        **_signature(offer.signed),
        "content_digest": str(manifest.content_digest()),
        "tool": f"mistral-fetch {__version__}",
        "files": files,
    }


def renew_papers(papers: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a snapshot's papers after its repair: what vouches for a file stays, who sent bytes of it is added."""
    new = {file["path"]: file for file in described["files"]}
    files = []
    for file in papers["files"]:
        senders = [*file["sources"], *(name for name in new[file["path"]]["sources"] if name != FROM_CACHE)]
        files.append({**file, "sources": list(dict.fromkeys(senders)), "verified_at": new[file["path"]]["verified_at"]})
    return {**papers, "files": files}


def _signature(signed: Signed | None) -> dict[str, Any]:
    """Return who vouches for the model, and by which document, a copy of which is kept in ``.signed``."""
    if signed is None:
        return {}
    record = {"kind": signed.kind, "key": f"sha256:{signed.fingerprint}", "document": f"sha256:{signed.sha256}"}
    return {"signature": record}


def _chat_template(known: str) -> dict[str, str | None]:
    """Return what the runtime may rely on: null for a base model, no key where the model's own files must tell."""
    return {"chat_template": None if known == "none" else known} if known else {}
