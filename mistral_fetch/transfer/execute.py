"""Carrying out an offer: the one place where sources, partials, verification and the snapshot meet.

The order is the safety: fetch into partials, verify each file as a whole, give it its blob name, lay out the
snapshot, name it with a ref, and only then forget the partials.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import (
    AllSourcesFailed,
    AssuranceTooLow,
    DigestMismatch,
    Interrupted,
    MirrorError,
    MistralFetchError,
    StoreError,
    UsageError,
)
from mistral_fetch.events import (
    FileVerified,
    Notice,
    Progress,
    Report,
    SnapshotReady,
    SourceFailed,
    SourceLied,
    TransferPlanned,
)
from mistral_fetch.manifest import FileEntry
from mistral_fetch.sources.base import Source, StopSignal, Target
from mistral_fetch.sources.urls import host_of
from mistral_fetch.store.blobs import adopt_blob, commit_partial, find_blob
from mistral_fetch.store.durable import disk_errors
from mistral_fetch.store.gc import list_empty_partials
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.partials import LOCK_NAME, TORRENT_STATE, CommittedBlob, Partial, describe_partial
from mistral_fetch.store.snapshots import RefRecord, write_ref, write_snapshot
from mistral_fetch.transfer.offer import Offer, names_content, partial_key
from mistral_fetch.transfer.plan import FileState, check_assurance, check_disk, plan_transfer
from mistral_fetch.transfer.provenance import Delivered, Ledger, describe_provenance, pin_manifest

# How often a file may turn out wrong as a whole before a source that has no other mirror for it is given up.
MAX_WHOLE_FILE_FAILURES = 2
# Each lock takes a file descriptor; smaller files beyond these are fetched without.
MAX_LOCKS = 200


@dataclass(frozen=True)
class Acquired:
    """A model that is now complete in the store."""

    directory: Path
    content_digest: str
    received_bytes: int
    assurance: Assurance


@dataclass(eq=False)
class _Work:
    """One file on its way: its partial, and what it became. ``asked`` is the entry without mirrors that lied."""

    entry: FileEntry
    asked: FileEntry
    partial: Partial
    blob: CommittedBlob | None = None
    assurance: Assurance = Assurance.SIZE
    failures: int = 0
    is_from_one_round: bool = True


def execute_offer(
    offer: Offer,
    ref_key: str,
    layout: Layout,
    *,
    floor: Assurance,
    disk_reserve_bytes: int,
    report: Report,
    stop: StopSignal,
    lock_timeout_seconds: float = 600.0,
) -> Acquired:
    """Fetch what is missing of an offer, verify all of it and publish the snapshot.

    Raises:
        AllSourcesFailed, TransferError, IntegrityError, AccessError: No source could deliver.
        AssuranceTooLow: Nothing strong enough vouches for a file.
        StoreLocked: Another process fetches the same files under another name, for too long.
        StoreError: The disk refused, or is too small.
        Interrupted: A stop was asked for; what is verified is kept.
    """

    def tell_owner(owner: str) -> None:
        report(Notice(f"waiting for {owner}"))

    ledger = Ledger(report)
    with ExitStack() as locks:
        for directory in _to_lock(layout, offer):
            lock = locked(directory / LOCK_NAME, f"fetch {ref_key}", lock_timeout_seconds, tell_owner, stop.check)
            locks.enter_context(lock)
        work = [_open_work(layout, offer, entry, report, stop) for entry in offer.manifest.files]
        try:
            _announce(layout, offer, work, disk_reserve_bytes, ledger.report)
            for item in work:
                if item.blob is None:
                    describe_partial(item.partial.directory, ref_key, item.entry.path, item.partial.grid.size)
            _obtain_all(layout, offer, work, floor, ledger, stop)
            for item in work:  # what an earlier run brought was let in by the floor of that run
                check_assurance((item.entry,), item.assurance, floor)
        finally:
            _let_go(offer, ref_key, work)
        return _publish(layout, offer, ref_key, work, ledger)


def _to_lock(layout: Layout, offer: Offer) -> list[Path]:
    """Return the partials to hold alone: two names may lead to the same content.

    Bytes that no piece hash vouches for are checked only as a whole file. A second writer would go on writing
    them into what the first one has just published.
    """
    largest = sorted(offer.manifest.files, key=lambda entry: -(entry.size or 0))[:MAX_LOCKS]
    return sorted({layout.partial(partial_key(offer, entry)) for entry in largest})  # one order for all: no deadlock


def _let_go(offer: Offer, ref_key: str, work: Sequence[_Work]) -> None:
    for item in work:
        item.partial.close_without_recording()
        if item.blob is None and not item.partial.has_bytes:
            item.partial.remove()  # not begun: nothing to list as unfinished
    for state in offer.scratch():
        if state.is_dir():
            describe_partial(state, ref_key, TORRENT_STATE, 0)


def _publish(layout: Layout, offer: Offer, ref_key: str, work: Sequence[_Work], ledger: Ledger) -> Acquired:
    delivered = [Delivered(item.entry, item.blob, item.assurance) for item in work if item.blob is not None]
    manifest = pin_manifest(offer.manifest, delivered)
    provenance = describe_provenance(manifest, offer, ref_key, delivered, ledger.sources)
    directory = write_snapshot(layout, manifest, provenance)
    content_digest = manifest.content_digest().value
    write_ref(layout, RefRecord(ref_key, offer.channel, content_digest, int(time.time())))
    for item in work:
        item.partial.remove()
    with disk_errors("removing what the transfer left", layout.partials):
        for left in (*offer.scratch(), *list_empty_partials(layout, ref_key)):
            if left.is_dir():
                shutil.rmtree(left)
    ledger.report(SnapshotReady(str(directory), content_digest))
    weakest = min(item.assurance for item in work)
    return Acquired(directory, content_digest, ledger.received_bytes, weakest)


def _open_work(layout: Layout, offer: Offer, entry: FileEntry, report: Report, stop: StopSignal) -> _Work:
    partial = Partial(layout.partial(partial_key(offer, entry)), entry.size or 0, entry.pieces)
    if partial.committed is not None and not names_content(offer, entry):
        partial.reset()  # the name is an address's, and what lies at an address changes
    work = _Work(entry, entry, partial)
    _look_into_store(layout, offer, work, report, stop)
    return work


def _look_into_store(layout: Layout, offer: Offer, item: _Work, report: Report, stop: StopSignal) -> None:
    """Take the blob that this transfer's earlier run committed, or else one of another model, read again as a whole."""
    entry, committed = item.entry, item.partial.committed
    is_ours = committed is not None and committed.size == entry.size and entry.sha256 in {None, committed.sha256}
    if committed is not None and is_ours and find_blob(layout, committed.sha256, committed.size):
        item.blob, item.assurance = committed, max(entry.assurance, _source_assurance(offer, entry))
        return
    # Nobody knows what happened to it since, and what is promised besides its sha256 may be false.
    item.blob = adopt_blob(layout, entry, report, stop.check)
    item.assurance = entry.assurance


def _source_assurance(offer: Offer, entry: FileEntry) -> Assurance:
    """Return what a blob committed by an earlier run was at least proved by: no weaker source was let in."""
    levels = {"btmh": Assurance.BTV2, "btih": Assurance.BTV1, "archive-md5": Assurance.MD5}
    return levels.get(offer.identity.rpartition("-")[0], entry.assurance)


def _announce(layout: Layout, offer: Offer, work: Sequence[_Work], reserve_bytes: int, report: Report) -> None:
    states = {
        item.entry.path: FileState(item.blob.sha256 if item.blob else None, item.partial.present_bytes) for item in work
    }
    plan = plan_transfer(offer.manifest.files, states)
    check_disk(plan, shutil.disk_usage(layout.home).free, reserve_bytes, str(layout.home))
    report(TransferPlanned(offer.manifest.info.name or offer.identity, plan.total_bytes, plan.present_bytes, len(work)))
    for item in work:
        report(Progress(item.entry.path, item.partial.grid.size if item.blob else item.partial.present_bytes))


def _obtain_all(
    layout: Layout, offer: Offer, work: Sequence[_Work], floor: Assurance, ledger: Ledger, stop: StopSignal
) -> None:
    causes: list[MistralFetchError] = []
    for opening in offer.sources:
        if all(item.blob for item in work):
            return
        label = "a source"
        try:
            source = opening()
            label = source.label
            _obtain_from(layout, offer, source, work, floor, ledger, stop)
        except (StoreError, Interrupted, UsageError):
            raise
        except MistralFetchError as error:
            causes.append(error)
            ledger.report(SourceFailed(label, f"{error.what}: {error.detail}", will_retry=False))
    if all(item.blob for item in work):
        return
    if len(causes) == 1 or all(isinstance(cause, AssuranceTooLow) for cause in causes):
        raise causes[-1]
    raise AllSourcesFailed(
        f"no source could deliver {offer.manifest.info.name or offer.identity}",
        causes,
        hint="run the same command again later: what was verified is kept; mistral-fetch doctor explains this machine",
    )


def _obtain_from(
    layout: Layout,
    offer: Offer,
    source: Source,
    work: Sequence[_Work],
    floor: Assurance,
    ledger: Ledger,
    stop: StopSignal,
) -> None:
    """Fetch every missing file from one source, and again what turned out wrong as a whole."""
    while missing := [item for item in work if item.blob is None]:
        check_assurance(tuple(item.entry for item in missing), source.assurance, floor)
        # Files of the same content share a partial: one of them is fetched, the others find its blob.
        turn = list({item.partial.directory: item for item in reversed(missing)}.values())
        for item in turn:
            item.is_from_one_round = not item.partial.present
        source.fetch([Target(item.asked, item.partial) for item in reversed(turn)], ledger.report, stop)
        for item in reversed(turn):
            _commit(layout, offer, source, item, ledger, stop)
        for twin in (item for item in missing if item not in turn):
            _look_into_store(layout, offer, twin, ledger.report, stop)
            ledger.report(Progress(twin.entry.path, twin.partial.grid.size if twin.blob else 0))


def _commit(layout: Layout, offer: Offer, source: Source, item: _Work, ledger: Ledger, stop: StopSignal) -> None:
    _look_into_store(layout, offer, item, ledger.report, stop)
    if item.blob is not None:
        return  # where locks do not work, another process may have been faster
    try:
        item.blob = commit_partial(layout, item.entry, item.partial, ledger.report, stop.check)
    except DigestMismatch as error:
        item.failures += 1
        senders = ledger.forget_senders(item.entry.path)
        names = ", ".join(senders) or source.label
        goes_on = _learn_from_mismatch(item, error, senders, names, ledger.report)
        if not goes_on and item.failures >= MAX_WHOLE_FILE_FAILURES:
            raise DigestMismatch(f"{error.what}: {names} sent another", detail=error.detail, hint=error.hint) from error
        return
    item.assurance = max(item.entry.assurance, source.assurance)
    ledger.report(FileVerified(item.entry.path, item.blob.size, item.blob.sha256, item.assurance.label))


def _learn_from_mismatch(
    item: _Work, error: DigestMismatch, senders: Sequence[str], names: str, report: Report
) -> bool:
    """Tell a disk that changed under us from a source that lied; return whether a mirror was dropped for another."""
    changed = item.partial.recheck()
    if changed:
        places = ", ".join(map(str, changed[:3]))
        report(Notice(f"{item.entry.path}: bytes on disk changed after they were written at {places}"))
        return False
    expected, _, actual = error.detail.partition(", got ")
    report(SourceLied(names, item.entry.path, "the whole file", expected.removeprefix("expected "), actual))
    item.partial.reset()
    left = _without_liar(item.asked, senders) if item.is_from_one_round else None
    item.asked = left or item.asked
    return left is not None


def _without_liar(entry: FileEntry, senders: Sequence[str]) -> FileEntry | None:
    """Return the entry without the mirror that sent a wrong file, or None if there is no other mirror.

    Several mirrors may have had a part in it. Then the first one asked is dropped, and the next round tells more.
    """
    ordered = sorted(entry.mirrors, key=lambda mirror: mirror.priority)
    hosts = {mirror.url: _host(mirror.url) for mirror in ordered}
    liar = next((host for host in hosts.values() if host in senders), None)
    left = tuple(mirror for mirror in entry.mirrors if hosts[mirror.url] not in {None, liar})
    return replace(entry, mirrors=left) if liar and left else None


def _host(url: str) -> str | None:
    try:
        return host_of(url)
    except MirrorError:
        return None  # not an address that anything can come from
