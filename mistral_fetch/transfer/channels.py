"""Trying the ways a model can be had, one after the other, until one delivers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_fetch.config import Settings
from mistral_fetch.errors import (
    AllSourcesFailed,
    ConfigError,
    Interrupted,
    MistralFetchError,
    OfflineRefused,
    StoreError,
    UsageError,
)
from mistral_fetch.events import BytesReceived, Event, Notice, Report, TransferPlanned
from mistral_fetch.sources.base import Source, StopSignal
from mistral_fetch.store.layout import Layout
from mistral_fetch.transfer.offer import Candidate, Offer
from mistral_fetch.transfer.plan import check_quota

if TYPE_CHECKING:
    from mistral_fetch.transfer.catalogs import CatalogInForce


@dataclass(frozen=True)
class Job:
    """One model to make complete: its key in the cache, where that is, and under which conditions."""

    key: str
    layout: Layout
    settings: Settings
    report: Report
    stop: StopSignal
    adopt_from: Sequence[Path] = ()
    """Directories whose files are adopted rather than downloaded, where they are the promised ones."""
    catalog: CatalogInForce | None = None
    """The catalog that the name was looked up in, where it was fetched for this."""


@dataclass(frozen=True)
class PullResult:
    """A complete model: where it is, how it came, and what vouches for it."""

    key: str
    directory: Path
    content_digest: str
    channel: str
    assurance: str
    was_complete: bool
    received_bytes: int


def try_candidates(job: Job, candidates: Sequence[Candidate], *, same_files: bool = False) -> PullResult:
    """Take the first channel that delivers. Once bytes have come by one, the others are not begun.

    Args:
        job: What to make complete.
        candidates: The channels, best first.
        same_files: All of them lead to the same files, so each goes on where the one before gave up.

    Raises:
        MistralFetchError: No channel delivered; see ``docs/exit-codes.md``.
    """
    allowed = _allowed(candidates)
    causes: list[MistralFetchError] = []
    for candidate in allowed:
        watch = _Watch(job.report)
        try:
            return _execute(job, candidate, watch.report)
        except (StoreError, Interrupted, UsageError, ConfigError):
            raise
        except MistralFetchError as error:
            causes.append(error)
            if watch.has_begun and not same_files:
                # Another channel means other files, from their first byte; going on later costs less.
                break
            if candidate is not allowed[-1]:
                job.report(Notice(f"{candidate.channel}: {error.what}; trying the next channel"))
    else:  # every channel was tried in vain, so one more may be worth a weaker proof
        _tell_excluded(candidates, job.report)
    raise causes[0] if len(causes) == 1 else no_channel(job.key, causes)


def _allowed(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return the candidates that the settings do not exclude.

    Raises:
        AssuranceTooLow: They exclude all of them.
    """
    reasons = [candidate.excluded for candidate in candidates if candidate.excluded is not None]
    if reasons and len(reasons) == len(candidates):
        raise reasons[0]
    return [candidate for candidate in candidates if candidate.excluded is None]


def _tell_excluded(candidates: Sequence[Candidate], report: Report) -> None:
    for candidate in candidates:
        if candidate.excluded is not None:
            report(Notice(f"{candidate.channel}: {candidate.excluded.what}; {candidate.excluded.hint}"))


def no_channel(key: str, causes: Sequence[MistralFetchError]) -> AllSourcesFailed:
    """Return the error for a model that no channel could deliver, or even describe."""
    return AllSourcesFailed(
        f"no channel could deliver {key}",
        causes,
        hint="run the same command again later; --via chooses a channel; mistral-fetch doctor explains this machine",
    )


def _execute(job: Job, candidate: Candidate, report: Report) -> PullResult:
    from mistral_fetch.transfer.execute import execute_offer
    from mistral_fetch.transfer.shelves import open_shelves

    offer, settings = candidate.open(), job.settings
    check_quota(offer.manifest.size, settings.cache_quota, str(job.layout.home))
    acquired = execute_offer(
        _without_network(offer, job) if settings.offline else offer,
        job.key,
        job.layout,
        floor=settings.min_assurance,
        disk_reserve_bytes=settings.disk_reserve,
        report=report,
        stop=job.stop,
        lock_timeout_seconds=settings.lock_timeout,
        shelves=open_shelves(job.adopt_from, settings, report),
    )
    return PullResult(
        job.key,
        acquired.directory,
        acquired.content_digest,
        candidate.channel,
        acquired.assurance.label,
        was_complete=False,
        received_bytes=acquired.received_bytes,
    )


def _without_network(offer: Offer, job: Job) -> Offer:
    """Return the offer with one source in place of its own, which says why nothing can be fetched."""

    def refuse() -> Source:
        raise refused_offline(job.key, job.settings)

    return replace(offer, sources=(refuse,))


def refused_offline(key: str, settings: Settings) -> OfflineRefused:
    """Return the error for a model that is not complete while the network is off limits."""
    return OfflineRefused(
        f"{key} is not complete in the cache, and the network is off limits",
        detail=f"expected a complete snapshot in {settings.home}, got none",
        hint="run it once without --offline",
    )


class _Watch:
    """Notices whether a channel has bytes to lose: some came now, or much is there from an earlier run."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.has_begun = False

    def report(self, event: Event) -> None:
        if isinstance(event, TransferPlanned):
            self.has_begun = event.present_bytes > event.total_bytes // 20
        elif isinstance(event, BytesReceived):
            self.has_begun = True
        self._report(event)
