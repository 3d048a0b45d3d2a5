"""Pulling exactly what a lock file says: its digests or nothing, whatever the reference leads to today."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mistral_fetch.config import Settings
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import DigestMismatch, IntegrityError, MistralFetchError, SizeMismatch
from mistral_fetch.events import Notice, Report
from mistral_fetch.lock_file import LockedFile, LockedModel, pinned_ref
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.provision import located
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import (
    RefRecord,
    find_refs,
    find_snapshot,
    load_manifest,
    load_provenance,
    write_ref,
)
from mistral_fetch.transfer.channels import Job, PullResult, refused_offline, try_candidates
from mistral_fetch.transfer.local import LocalModel, readable_layouts
from mistral_fetch.transfer.offer import Candidate, Offer
from mistral_fetch.transfer.pull import is_described_here, judge, name_today, refuse_unsigned_kinds

_HINT = "if the change is wanted: mistral-fetch lock --update"


def pull_locked(
    model: LockedModel,
    base: Path,
    settings: Settings,
    report: Report,
    stop: StopSignal,
    adopt_from: Sequence[Path] = (),
) -> PullResult:
    """Make exactly the locked files complete in the cache. Nothing happens, and no socket is opened, if they are.

    Args:
        model: The entry of the lock file.
        base: Where a relative path in its reference begins.
        settings: As for a pull.
        report: Told what happens.
        stop: Set it to stop in an orderly way.
        adopt_from: Directories whose files are adopted where they are the locked ones.

    Raises:
        IntegrityError: The source describes other files today, or sent others.
        MistralFetchError: As a pull.
    """
    from mistral_fetch.store.lock import locked

    layout = Layout(settings.home)
    if here := find_locked(layout, model, settings):
        return here
    ref = located(model.ref, base)
    refuse_unsigned_kinds(ref, settings)

    def tell_owner(owner: str) -> None:
        report(Notice(f"waiting for {owner}"))

    layout.check_version()
    named = _complete_but_unnamed(layout, model, settings)
    if named is None and settings.offline and not (adopt_from and is_described_here(ref)):
        raise refused_offline(model.key, settings)
    layout.prepare()
    with locked(layout.lock(model.key), f"sync {model.key}", settings.lock_timeout, tell_owner, stop.check):
        # While we waited, the other process may have done the work.
        if here := find_locked(layout, model, settings):
            return here
        if here := _complete_but_unnamed(layout, model, settings):
            write_ref(layout, RefRecord(model.key, model.channel, here.content_digest, int(time.time())))
            return here
        _, catalog = name_today(ref, settings, report, stop)
        return _fetch(model, base, Job(model.key, layout, settings, report, stop, adopt_from, catalog))


def find_locked(layout: Layout, model: LockedModel, settings: Settings) -> PullResult | None:
    """Return the locked files if they are complete under the locked name, here or in a shared cache."""
    for place in (layout, *readable_layouts(settings.shared_homes)):
        for record in find_refs(place, model.key):
            directory = find_snapshot(place, record.content_digest)
            if directory is not None and _is_locked_one(directory, model):
                return judge(LocalModel(directory, record), model.key, settings)
    return None


def _complete_but_unnamed(layout: Layout, model: LockedModel, settings: Settings) -> PullResult | None:
    """Return the locked files where another name led to them."""
    digest = model.content_digest
    directory = find_snapshot(layout, digest.value) if digest else None
    if digest is None or directory is None or not _is_locked_one(directory, model):
        return None
    record = RefRecord(model.key, model.channel, digest.value, 0)
    return judge(LocalModel(directory, record), model.key, settings)


def _is_locked_one(directory: Path, model: LockedModel) -> bool:
    """Return whether a complete snapshot consists of the locked files, as far as their digests tell."""
    if model.content_digest is not None:
        return directory.name == model.content_digest.value
    try:
        manifest, papers = load_manifest(directory), load_provenance(directory)
    except MistralFetchError:
        return False
    entries = {entry.path: entry for entry in manifest.files}
    if set(entries) != {file.path for file in model.files}:
        return False
    return all(_is_locked_file(entries[file.path], file, model, papers) for file in model.files)


def _is_locked_file(entry: FileEntry, file: LockedFile, model: LockedModel, papers: Mapping[str, Any]) -> bool:
    if entry.size != file.size:
        return False
    if file.digest is None:
        return bool(papers.get("identity") == model.identity)
    if file.digest.algorithm == "sha256":
        return entry.sha256 == file.digest.value
    records = [record for record in papers.get("files", []) if record.get("path") == file.path]
    return any(str(file.digest) in map(str, record.get("promised", [])) for record in records)


def _fetch(model: LockedModel, base: Path, job: Job) -> PullResult:
    from mistral_fetch.transfer.locking import of_channel
    from mistral_fetch.transfer.resolve import Resolver

    may_adopt = bool(job.adopt_from)
    ref = pinned_ref(located(model.ref, base), model.revision)
    with Resolver(job.layout, job.settings, job.report, job.stop, may_adopt=may_adopt, catalog=job.catalog) as resolver:
        candidates = of_channel(resolver.candidates(ref), model.channel, model.key)
        result = try_candidates(job, [_held_to(candidate, model) for candidate in candidates])
        resolver.linger(result.directory)
        return result


def _held_to(candidate: Candidate, model: LockedModel) -> Candidate:
    """Return the candidate with its offer refused unless it is of the locked files, and held to their digests."""

    def open_offer() -> Offer:
        offer = candidate.open()
        return replace(offer, manifest=hold_manifest(offer, model))

    return replace(candidate, open=open_offer)


def hold_manifest(offer: Offer, model: LockedModel) -> Manifest:
    """Return an offer's manifest with the locked digests in it.

    Raises:
        IntegrityError: It is of other files.
    """
    entries = {entry.path: entry for entry in offer.manifest.files}
    locked = {file.path: file for file in model.files}
    if set(entries) != set(locked):
        different = sorted(set(entries) ^ set(locked))
        raise IntegrityError(
            f"{offer.channel} offers other files for {model.key} than the lock file has",
            detail=f"expected {len(locked)} files, got {len(entries)}; not in both: {', '.join(different[:3])}",
            hint=_HINT,
        )
    if any(file.digest is None for file in model.files) and offer.identity != model.identity:
        raise IntegrityError(
            f"{offer.channel} describes {model.key} otherwise than when it was locked",
            detail=f"expected {model.identity}, got {offer.identity}",
            hint=_HINT,
        )
    return offer.manifest.with_files(_hold_entry(entries[file.path], file, offer.channel) for file in model.files)


def _hold_entry(entry: FileEntry, file: LockedFile, channel: str) -> FileEntry:
    if entry.size not in {None, file.size}:
        raise SizeMismatch(
            f"{channel} offers another {entry.path} than the lock file has",
            detail=f"expected {file.size} bytes, got {entry.size}",
            hint=_HINT,
        )
    if file.digest is None:
        return replace(entry, size=file.size)
    offered = entry.digest(file.digest.algorithm)
    if offered not in {None, file.digest}:
        raise DigestMismatch(
            f"{channel} offers another {entry.path} than the lock file has",
            detail=f"expected {file.digest}, got {offered}",
            hint=_HINT,
        )
    digests = entry.digests if offered else (*entry.digests, file.digest)
    return replace(entry, size=file.size, digests=digests)


def floor_of(settings: Settings, *levels: Assurance | None) -> Settings:
    """Return the settings with the highest of several floors."""
    return replace(settings, min_assurance=max([settings.min_assurance, *(level for level in levels if level)]))
