"""Carrying out an offer: the one place where sources, partials, verification and the snapshot meet.

The order is the safety: fetch into partials, verify each file as a whole, give it its blob name, lay out the
snapshot, name it with a ref, and only then forget the partials.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import UnsafePath
from mistral_fetch.events import (
    FilesOpened,
    FileVerified,
    Notice,
    PieceView,
    Progress,
    Report,
    SnapshotReady,
    TransferPlanned,
)
from mistral_fetch.manifest import FileEntry
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.crash_points import reached
from mistral_fetch.store.durable import disk_errors
from mistral_fetch.store.gc import list_empty_partials
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.partial_notes import LOCK_NAME, TORRENT_STATE, describe_partial
from mistral_fetch.store.snapshots import RefRecord, write_ref, write_snapshot
from mistral_fetch.transfer.adoption import Adopter
from mistral_fetch.transfer.obtain import Work, look_into_store, obtain_all, open_partial
from mistral_fetch.transfer.offer import Offer, names_content, partial_key
from mistral_fetch.transfer.plan import FileState, check_assurance, check_disk, plan_transfer
from mistral_fetch.transfer.provenance import Delivered, Ledger, describe_provenance, pin_manifest, renew_papers
from mistral_fetch.transfer.shelves import Shelf
from mistral_fetch.transfer.suspects import Suspects

# Each lock takes a file descriptor; smaller files beyond these are fetched without.
MAX_LOCKS = 200


@dataclass(frozen=True)
class Acquired:
    """A model that is now complete in the store."""

    directory: Path
    content_digest: str
    received_bytes: int
    assurance: Assurance


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
    shelves: Sequence[Shelf] = (),
) -> Acquired:
    """Fetch what is missing of an offer, verify all of it and publish the snapshot.

    What lies on one of the ``shelves`` already is taken from there, before any source is opened.

    Raises:
        AllSourcesFailed, TransferError, IntegrityError, AccessError: No source could deliver.
        AssuranceTooLow: Nothing strong enough vouches for a file.
        UnsafePath: This system cannot keep a file of such a name.
        StoreLocked: Another process fetches the same files under another name, for too long.
        StoreError: The disk refused, or is too small.
        Interrupted: A stop was asked for; what is verified is kept.
    """

    def tell_owner(owner: str) -> None:
        report(Notice(f"waiting for {owner}"))

    _refuse_unstorable(layout, offer)
    ledger = Ledger(report)
    with ExitStack() as locks:
        for directory in _to_lock(layout, offer):
            lock = locked(directory / LOCK_NAME, f"fetch {ref_key}", lock_timeout_seconds, tell_owner, stop.check)
            locks.enter_context(lock)
        work = [_open_work(layout, offer, entry, report, stop) for entry in offer.manifest.files]
        adopter = Adopter(shelves, floor, disk_reserve_bytes)
        try:
            for item in work:
                _adopt(layout, offer, item, adopter, ledger, stop)
            _announce(layout, offer, work, disk_reserve_bytes, ledger.report)
            for item in work:
                if item.blob is None:
                    describe_partial(item.partial.directory, ref_key, item.entry.path, item.partial.grid.size)
            obtain_all(layout, offer, work, floor, ledger, stop)
            for item in work:  # what an earlier run brought was let in by the floor of that run
                check_assurance((item.entry,), item.assurance, floor)
        finally:
            _let_go(offer, ref_key, work)
        return _publish(layout, offer, ref_key, work, ledger)


def _refuse_unstorable(layout: Layout, offer: Offer) -> None:
    """Refuse names that this system cannot keep before the first byte rather than after the last."""
    for entry in offer.manifest.files:
        reason = system.objection(entry.path, layout.snapshot("0" * 64))
        if reason:
            raise UnsafePath(
                f"this system cannot keep a file called {entry.path[:120]!r}",
                detail=f"expected a name that it allows, but {reason}",
                hint="fetch it on another system, choose a shorter --home, or ask its publisher for another name",
            )


def _to_lock(layout: Layout, offer: Offer) -> list[Path]:
    """Return the partials to hold alone: two names may lead to the same content.

    Bytes that no piece hash vouches for are checked only as a whole file. A second writer would go on writing
    them into what the first one has just published.
    """
    largest = sorted(offer.manifest.files, key=lambda entry: -(entry.size or 0))[:MAX_LOCKS]
    return sorted({layout.partial(partial_key(offer, entry)) for entry in largest})  # one order for all: no deadlock


def _let_go(offer: Offer, ref_key: str, work: Sequence[Work]) -> None:
    has_failed = any(item.blob is None for item in work)
    for item in work:
        item.partial.close_without_recording()
        # Until the ref is written, rm must find the lock of a file whose blob is there.
        is_needless = item.blob is None or (has_failed and item.partial.committed is None)
        if is_needless and not item.partial.has_bytes:
            item.partial.remove()  # not begun: nothing to list as unfinished
    for state in offer.scratch():
        if state.is_dir():
            describe_partial(state, ref_key, TORRENT_STATE, 0)


def _publish(layout: Layout, offer: Offer, ref_key: str, work: Sequence[Work], ledger: Ledger) -> Acquired:
    delivered = [Delivered(item.entry, item.blob, item.assurance) for item in work if item.blob is not None]
    manifest = pin_manifest(offer.manifest, delivered)
    described = describe_provenance(manifest, offer, ref_key, delivered, ledger.sources)
    # That the bytes are the same again proves no more than was proved of them when they came.
    provenance = described if offer.papers is None else renew_papers(offer.papers, described)
    directory = write_snapshot(layout, manifest, provenance, offer.signed)
    content_digest = manifest.content_digest().value
    write_ref(layout, RefRecord(ref_key, offer.channel, content_digest, int(time.time())))
    reached("ref-written")
    for item in work:
        item.partial.remove()
    with disk_errors("removing what the transfer left", layout.partials):
        for left in (*offer.scratch(), *list_empty_partials(layout, ref_key)):
            if left.is_dir():
                shutil.rmtree(left)
    ledger.report(SnapshotReady(str(directory), content_digest))
    reached("partials-removed")
    weakest = min(item.assurance for item in work)
    return Acquired(directory, content_digest, ledger.received_bytes, weakest)


def _open_work(layout: Layout, offer: Offer, entry: FileEntry, report: Report, stop: StopSignal) -> Work:
    partial = open_partial(layout, offer, entry)
    if partial.committed is not None and not names_content(offer, entry):
        partial.reset()  # the name is an address's, and what lies at an address changes
    work = Work(entry, partial, Suspects(entry))
    look_into_store(layout, offer, work, report, stop)
    return work


def _adopt(layout: Layout, offer: Offer, item: Work, adopter: Adopter, ledger: Ledger, stop: StopSignal) -> None:
    """Take a missing file from where it lies on this machine, if it does."""
    if item.blob is None and item.partial.committed is not None:
        look_into_store(layout, offer, item, ledger.report, stop)  # a file of the same content was just adopted
    if item.blob is not None or (item.partial.present and not item.partial.missing_pieces()):
        return
    adopted = adopter.adopt(layout, item.entry, item.partial, ledger.report, stop.check)
    if adopted is None:
        return
    item.blob, item.assurance = adopted.blob, item.entry.assurance
    ledger.credit(item.entry.path, adopted.label)
    ledger.report(FileVerified(item.entry.path, item.blob.size, item.blob.sha256, item.assurance.label))


def _view(item: Work) -> PieceView:
    count = item.partial.grid.count
    if item.blob:
        return PieceView(item.entry.path, count, lambda: dict.fromkeys(range(count), ""))
    return PieceView(item.entry.path, count, item.partial.present_senders)


def _announce(layout: Layout, offer: Offer, work: Sequence[Work], reserve_bytes: int, report: Report) -> None:
    states = {
        item.entry.path: FileState(item.blob.sha256 if item.blob else None, item.partial.present_bytes) for item in work
    }
    plan = plan_transfer(offer.manifest.files, states)
    check_disk(plan, shutil.disk_usage(layout.home).free, reserve_bytes, str(layout.home))
    report(TransferPlanned(offer.manifest.info.name or offer.identity, plan.total_bytes, plan.present_bytes, len(work)))
    report(FilesOpened(tuple(_view(item) for item in work)))
    for item in work:
        report(Progress(item.entry.path, item.partial.grid.size if item.blob else item.partial.present_bytes))
