"""The main job as one function, read downwards: find it here, else lock, resolve, execute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from mistral_fetch.ref import Ref
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import load_provenance
from mistral_fetch.transfer.local import find_local, ref_key
from mistral_fetch.transfer.offer import Candidate


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


def pull(ref: Ref, settings: Settings, report: Report, stop: StopSignal, *, refresh: bool = False) -> PullResult:
    """Make a model complete in the cache and return where it is. Nothing happens if it is already.

    Args:
        ref: What to fetch.
        settings: Where to keep it, and which sources and assurance are acceptable.
        report: Told what happens.
        stop: Set it to stop in an orderly way.
        refresh: Look at the source again even if the cache has a complete snapshot of this name.

    Raises:
        MistralFetchError: See ``docs/exit-codes.md``; whatever was verified is kept for the next run.
    """
    layout = Layout(settings.home)
    key = ref_key(ref, settings)
    if not refresh and (here := _already_here(layout, key, settings)):
        return here
    if settings.offline:
        raise OfflineRefused(
            f"{key} is not complete in the cache, and the network is off limits",
            detail=f"expected a complete snapshot in {settings.home}, got none",
            hint="run it once without --offline",
        )
    from mistral_fetch.store.lock import locked

    layout.prepare()

    def tell_owner(owner: str) -> None:
        report(Notice(f"waiting for {owner}"))

    with locked(layout.lock(key), f"pull {key}", settings.lock_timeout, tell_owner, stop.check):
        # While we waited, the other process may have done the work.
        if not refresh and (here := _already_here(layout, key, settings)):
            return here
        return _fetch(ref, key, layout, settings, report, stop)


def _already_here(layout: Layout, key: str, settings: Settings) -> PullResult | None:
    local = find_local(layout, key, settings.via)
    if local is None:
        return None
    try:
        files = load_provenance(local.directory).get("files", [])
    except StoreError:
        return None  # its papers are damaged: pulling writes them anew, and finds the bytes in the cache
    levels = [str(file.get("assurance", "size")) for file in files if isinstance(file, dict)]
    weakest = min(levels, key=_rank, default="size")
    if _rank(weakest) < settings.min_assurance:
        return None
    record = local.record
    return PullResult(key, local.directory, record.content_digest, record.channel, weakest, True, 0)


def _rank(label: str) -> int:
    from mistral_fetch.digest import Assurance

    try:
        return Assurance.parse(label)
    except ValueError:
        return 0


def _fetch(ref: Ref, key: str, layout: Layout, settings: Settings, report: Report, stop: StopSignal) -> PullResult:
    from mistral_fetch.transfer.resolve import Resolver

    with Resolver(layout, settings, report, stop) as resolver:
        return _try_candidates(resolver.candidates(ref), key, layout, settings, report, stop)


def _try_candidates(
    candidates: Sequence[Candidate], key: str, layout: Layout, settings: Settings, report: Report, stop: StopSignal
) -> PullResult:
    """Take the first channel that delivers. Once bytes have come by one, the others are not begun."""
    from mistral_fetch.transfer.execute import execute_offer

    allowed = _allowed(candidates)
    causes: list[MistralFetchError] = []
    for candidate in allowed:
        watch = _Watch(report)
        try:
            acquired = execute_offer(
                candidate.open(),
                key,
                layout,
                floor=settings.min_assurance,
                disk_reserve_bytes=settings.disk_reserve,
                report=watch.report,
                stop=stop,
                lock_timeout_seconds=settings.lock_timeout,
            )
        except (StoreError, Interrupted, UsageError, ConfigError):
            raise
        except MistralFetchError as error:
            causes.append(error)
            if watch.has_begun:
                # Another channel means other files, from their first byte; going on later costs less.
                break
            if candidate is not allowed[-1]:
                report(Notice(f"{candidate.channel}: {error.what}; trying the next channel"))
            continue
        return PullResult(
            key,
            acquired.directory,
            acquired.content_digest,
            candidate.channel,
            acquired.assurance.label,
            was_complete=False,
            received_bytes=acquired.received_bytes,
        )
    else:  # every channel was tried in vain, so one more may be worth a weaker proof
        _tell_excluded(candidates, report)
    if len(causes) == 1:
        raise causes[0]
    raise AllSourcesFailed(
        f"no channel could deliver {key}",
        causes,
        hint="run the same command again later; --via chooses a channel; mistral-fetch doctor explains this machine",
    )


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
