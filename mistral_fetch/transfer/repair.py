"""Making a model of the cache whole again: what is wrong is found offline, and only that is fetched.

The snapshot's own manifest says what to fetch, so a branch that moved meanwhile changes nothing; the mirrors and
torrents it names are asked first, then whatever its ref leads to today.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_fetch.config import Settings
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import NotInCache, StoreError, TrustError, UsageError
from mistral_fetch.events import BytesReceived, Event, Notice, Report
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.ref import DirectoryRef, Ref, parse_ref
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.durable import disk_errors
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.snapshots import PROVENANCE_NAME, RefRecord, load_provenance, load_signed
from mistral_fetch.store.verify import FileVerdict, verify_snapshot
from mistral_fetch.transfer.authenticity import check_papers, pinned_keys
from mistral_fetch.transfer.channels import Job, refused_offline, try_candidates
from mistral_fetch.transfer.local import acceptable_refs, local_key
from mistral_fetch.transfer.offer import Candidate, Offer
from mistral_fetch.transfer.pull import is_described_here
from mistral_fetch.transfer.resolve import Resolver
from mistral_fetch.trust import with_signed


@dataclass(frozen=True)
class Damage:
    """What is wrong with a snapshot. ``manifest`` and ``papers`` are None where they cannot be believed."""

    key: str
    record: RefRecord
    directory: Path
    manifest: Manifest | None
    papers: Mapping[str, Any] | None
    verdicts: tuple[FileVerdict, ...]


@dataclass(frozen=True)
class Repaired:
    """Where the model is now, and how many bytes were received for each file."""

    directory: Path
    received: Mapping[str, int]


def find_damage(text: str, settings: Settings, report: Report, stop: StopSignal) -> Damage:
    """Hash the newest snapshot of what a person typed and return what is wrong with it; changes nothing.

    Raises:
        NotInCache: The cache has no such model.
        UsageError, UnknownModel, NotFoundError: It is no reference.
        Interrupted: ``stop`` was set.
    """
    layout = Layout(settings.home)
    key = local_key(layout, text, settings)
    records = acceptable_refs(layout, key, settings.via)
    if not records:
        raise NotInCache(
            f"{text} is not in the cache at {layout.home}",
            detail="expected a model to repair, got none",
            hint=f"fetch it with: mistral-fetch pull {text}",
        )
    directory = layout.snapshot(records[0].content_digest)
    manifest, verdicts = verify_snapshot(directory, report, stop.check)
    papers = _readable_papers(directory, manifest)
    bad = [verdict for verdict in verdicts if not verdict.is_good]
    if manifest is not None and papers is None:
        bad.append(FileVerdict(PROVENANCE_NAME, 0, "expected a readable record, got none"))
    return Damage(key, records[0], directory, manifest, papers, tuple(bad))


def repair(
    text: str, damage: Damage, settings: Settings, report: Report, stop: StopSignal, adopt_from: Sequence[Path] = ()
) -> Repaired:
    """Fetch what is wrong and lay the snapshot out anew where its links are at fault.

    Args:
        text: What the person typed, for the sources it leads to.
        damage: What :func:`find_damage` found.
        settings: Which sources are acceptable.
        report: Told what happens.
        stop: Set it to stop in an orderly way.
        adopt_from: Directories that may hold good copies.

    Raises:
        MistralFetchError: As :func:`~mistral_fetch.transfer.pull.pull`; what is good stays where it is.
    """
    received: dict[str, int] = {}

    def count(event: Event) -> None:
        if isinstance(event, BytesReceived):
            received[event.path] = received.get(event.path, 0) + event.length
        report(event)

    layout = Layout(settings.home)
    job = Job(damage.key, layout, settings, count, stop, adopt_from)

    def tell_owner(owner: str) -> None:
        report(Notice(f"waiting for {owner}"))

    with (
        locked(layout.lock(damage.key), f"repair {damage.key}", settings.lock_timeout, tell_owner, stop.check),
        Resolver(layout, settings, count, stop, may_adopt=True) as resolver,
    ):
        candidates = _candidates(text, damage, job, resolver)
        _drop_wrong_links(layout, damage)
        result = try_candidates(job, candidates, same_files=True)
    return Repaired(result.directory, received)


def _readable_papers(directory: Path, manifest: Manifest | None) -> Mapping[str, Any] | None:
    """Return the provenance record if it speaks of every file of the manifest."""
    try:
        papers = load_provenance(directory)
        told = {str(file["path"]): [file["assurance"], *file["sources"], *file["promised"]] for file in papers["files"]}
        load_signed(directory, papers)
    except (StoreError, KeyError, TypeError):
        return None
    return papers if manifest is not None and set(told) == {entry.path for entry in manifest.files} else None


def _drop_wrong_links(layout: Layout, damage: Damage) -> None:
    """Remove what stands in a wrong file's place but is no link to its blob: a copy, a hard link, something else.

    Then the snapshot is not complete any more, and is laid out anew. A symbolic link is whole with its blob.
    """
    if damage.manifest is None:
        return  # not complete as it is
    entries = {entry.path: entry for entry in damage.manifest.files}
    with disk_errors("removing a damaged file", damage.directory):
        for entry in (entries[verdict.path] for verdict in damage.verdicts if verdict.path in entries):
            link = damage.directory / entry.path
            if link.is_symlink() and link.resolve() == layout.blob(entry.sha256 or "").resolve():
                continue
            if link.is_dir() and not link.is_symlink():
                shutil.rmtree(link)
            else:
                link.unlink(missing_ok=True)


def _candidates(text: str, damage: Damage, job: Job, resolver: Resolver) -> list[Candidate]:
    ref = _ref_of(text)
    own = _own_offer(damage, resolver, job.settings)
    candidates = []
    if own is not None:
        candidates.append(Candidate(damage.record.channel, lambda: own))
    if ref is not None and (not job.settings.offline or is_described_here(ref)):
        usual = [_steered(candidate, damage, own, job.report) for candidate in _today(ref, own, job, resolver)]
        # A manifest that names no source of its own would only fail before those of the ref are asked.
        candidates = [*(candidates if own and own.sources else []), *usual]
    if not candidates:
        raise refused_offline(damage.key, job.settings) if job.settings.offline else _no_way(damage)
    return candidates


def _today(ref: Ref, own: Offer | None, job: Job, resolver: Resolver) -> Sequence[Candidate]:
    """Return what a reference leads to today; a catalog that nobody may believe any more is no reason to stop."""
    try:
        return resolver.candidates(ref)
    except (TrustError, NotInCache) as error:
        if own is None or not own.sources:
            raise
        job.report(Notice(f"{error.what}; only the sources of the model's own manifest are asked"))
        return []


def _ref_of(text: str) -> Ref | None:
    """Return the reference, or None of a key that only ``list`` prints: then the snapshot's own sources must do."""
    try:
        ref = parse_ref(text)
    except UsageError:
        return None
    return None if isinstance(ref, DirectoryRef) else ref


def _own_offer(damage: Damage, resolver: Resolver, settings: Settings) -> Offer | None:
    """Return the snapshot's own manifest as an offer; without its papers nobody could say what vouched for it.

    Raises:
        BadSignature: The papers have a signature, but no pinned key made it.
    """
    if damage.manifest is None or damage.papers is None:
        return None
    sources = resolver.manifest_sources(damage.manifest)
    identity = str(damage.papers.get("identity", ""))
    scratch = resolver.state_directories
    signed, manifest = load_signed(damage.directory, damage.papers), damage.manifest
    if signed is not None and settings.trust_keys:
        check_papers(damage.directory, damage.papers, manifest, pinned_keys(settings), damage.key)
        proved = {file["path"] for file in damage.papers["files"] if file.get("assurance") == Assurance.SIGNED.label}
        manifest = with_signed(manifest, lambda entry: entry.path in proved)
    return Offer(damage.record.channel, identity, manifest, sources, scratch, damage.papers, signed)


def _steered(candidate: Candidate, damage: Damage, own: Offer | None, report: Report) -> Candidate:
    """Return the candidate with its sources asked for the snapshot's own files, as long as those are what it has."""

    def open_offer() -> Offer:
        offer = candidate.open()
        if own is None or damage.manifest is None:
            return replace(offer, manifest=_with_known_pieces(offer.manifest, damage.manifest))
        theirs = {entry.path: entry for entry in offer.manifest.files}
        if not all(_may_be_same(entry, theirs.get(entry.path), damage.papers) for entry in own.manifest.files):
            report(Notice(f"{candidate.channel}: {damage.key} has other files today; they are fetched instead"))
            return offer
        entries = [
            replace(entry, mirrors=theirs[entry.path].mirrors, torrents=theirs[entry.path].torrents)
            for entry in own.manifest.files
        ]
        return replace(own, manifest=own.manifest.with_files(entries), sources=offer.sources, scratch=offer.scratch)

    return Candidate(candidate.channel, open_offer)


def _with_known_pieces(manifest: Manifest, known: Manifest | None) -> Manifest:
    """Add the piece hashes that this cache computed of files with the same sha256."""
    pieces = {entry.sha256: entry.pieces for entry in known.files} if known else {}
    return manifest.with_files(
        replace(entry, pieces=pieces.get(entry.sha256)) if entry.pieces is None and entry.sha256 else entry
        for entry in manifest.files
    )


def _may_be_same(entry: FileEntry, other: FileEntry | None, papers: Mapping[str, Any] | None) -> bool:
    """Return whether nothing that is known of two files tells them apart. The bytes themselves are verified anyway."""
    if other is None or other.size not in {None, entry.size}:
        return False
    records = (papers or {}).get("files", [])
    promised = {text for file in records if file["path"] == entry.path for text in map(str, file["promised"])}
    known = promised | {str(digest) for digest in entry.digests}
    algorithms = {text.partition(":")[0] for text in known}
    return all(str(digest) in known for digest in other.digests if digest.algorithm in algorithms)


def _no_way(damage: Damage) -> UsageError:
    return UsageError(
        f"nothing says where {damage.key} comes from",
        detail="expected a reference, or a snapshot whose manifest is readable",
        hint="name the model as it was pulled: mistral-fetch repair REF",
    )
