"""Finding out what a reference stands for today, exactly enough to be asked for again; no content is fetched."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mistral_fetch.config import Settings
from mistral_fetch.digest import Digest
from mistral_fetch.errors import (
    AssuranceTooLow,
    ConfigError,
    Interrupted,
    MistralFetchError,
    StoreError,
    UsageError,
)
from mistral_fetch.events import Notice, Report
from mistral_fetch.lock_file import LockedFile, LockedModel
from mistral_fetch.manifest import FileEntry
from mistral_fetch.provision import WantedModel, located
from mistral_fetch.ref import CatalogRef, HubRef, ManifestRef, Ref, TorrentRef
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.layout import Layout
from mistral_fetch.transfer.channels import Job, no_channel, refused_offline
from mistral_fetch.transfer.local import read_local_file
from mistral_fetch.transfer.offer import Candidate, Offer
from mistral_fetch.transfer.preview import choose_source, scratch_cache
from mistral_fetch.transfer.pull import is_described_here, name_today, refuse_unsigned_kinds
from mistral_fetch.transfer.resolve import Resolver


def lock_model(wanted: WantedModel, base: Path, settings: Settings, report: Report, stop: StopSignal) -> LockedModel:
    """Return what a reference stands for today, by the best channel that is allowed.

    Args:
        wanted: The reference and its rules.
        base: Where relative paths in it begin.
        settings: The other rules.
        report: Told what is worth a line.
        stop: Set it to stop.

    Raises:
        MistralFetchError: No channel describes the model well enough; see ``docs/exit-codes.md``.
    """
    ref = located(wanted.ref, base)
    refuse_unsigned_kinds(ref, settings)
    if settings.offline and not is_described_here(ref):
        raise refused_offline(wanted.ref, settings)
    key, catalog = name_today(ref, settings, report, stop, keeps=False)
    layout = Layout(settings.home)
    job = Job(key, layout, settings, report, stop, (), catalog)
    with (
        scratch_cache(layout) as scratch,
        Resolver(scratch, settings, report, stop, may_adopt=True, catalog=catalog) as resolver,
    ):
        return _first_that_can(job, wanted, ref, of_channel(resolver.candidates(ref), wanted.channel, key))


def of_channel(candidates: Sequence[Candidate], channel: str, key: str) -> Sequence[Candidate]:
    """Return the candidates of one channel; of all where none is named.

    Raises:
        UsageError: There is no such channel.
    """
    chosen = [candidate for candidate in candidates if channel in {"", candidate.channel}]
    if not chosen:
        offered = ", ".join(candidate.channel for candidate in candidates)
        raise UsageError(
            f"{key} is not offered by the channel {channel}",
            detail=f"expected {channel}, got only: {offered}",
            hint="leave the channel out of mistral-fetch.toml, or name another",
        )
    return chosen


def _first_that_can(job: Job, wanted: WantedModel, ref: Ref, candidates: Sequence[Candidate]) -> LockedModel:
    causes: list[MistralFetchError] = []
    for candidate in candidates:
        try:
            if candidate.excluded is not None:
                raise candidate.excluded
            return _describe(job, wanted, ref, candidate.open())
        except (StoreError, Interrupted, UsageError, ConfigError):
            raise
        except MistralFetchError as error:
            causes.append(error)
            if candidate is not candidates[-1]:
                job.report(Notice(f"{candidate.channel}: {error.what}; trying the next channel"))
    raise causes[0] if len(causes) == 1 else no_channel(job.key, causes)


def _describe(job: Job, wanted: WantedModel, ref: Ref, offer: Offer) -> LockedModel:
    source, refusal = choose_source(job, offer, offer.manifest.files)
    if isinstance(refusal, AssuranceTooLow):
        raise refusal
    levels = [max(entry.assurance, source.assurance) if source else entry.assurance for entry in offer.manifest.files]
    files = tuple(
        LockedFile(entry.path, entry.size or 0, strongest_digest(entry)) if entry.size is not None else _unsized(entry)
        for entry in offer.manifest.files
    )
    revision = _revision(ref, job.key, offer)
    return LockedModel(wanted.ref, revision, offer.channel, offer.identity, min(levels), files)


def _unsized(entry: FileEntry) -> LockedFile:
    raise UsageError(
        f"the size of {entry.path} is not known before it is fetched",
        detail="expected a source that tells sizes, got one that does not",
        hint="name another channel for this model",
    )


def strongest_digest(entry: FileEntry) -> Digest | None:
    """Return the whole-file digest that proves most."""
    return max(entry.digests, key=lambda digest: digest.assurance or 0, default=None)


def _revision(ref: Ref, key: str, offer: Offer) -> str:
    if isinstance(ref, CatalogRef):
        return key
    if isinstance(ref, HubRef):
        return offer.manifest.info.version
    if isinstance(ref, ManifestRef | TorrentRef) and not ref.is_url:
        return hashlib.sha256(read_local_file(ref.location)).hexdigest()[:16]
    return ""
