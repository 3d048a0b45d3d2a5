"""Getting the files of an offer, one source after the other: fetch, verify as a whole, name, or find out who lied."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import (
    AccessError,
    AllSourcesFailed,
    AssuranceTooLow,
    DigestMismatch,
    IntegrityError,
    Interrupted,
    MistralFetchError,
    StoreError,
    TransferError,
    UsageError,
)
from mistral_fetch.events import (
    BytesVerified,
    FileVerified,
    Notice,
    Progress,
    Report,
    SourceFailed,
    SourceLied,
)
from mistral_fetch.manifest import FileEntry
from mistral_fetch.sources.base import Source, StopSignal, Target
from mistral_fetch.store.blobs import adopt_blob, commit_partial, find_blob, seal_blob
from mistral_fetch.store.durable import disk_errors
from mistral_fetch.store.follower import PrefixFollower
from mistral_fetch.store.hashing import FileHashes
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.partials import Partial
from mistral_fetch.store.salvage import salvage_blob
from mistral_fetch.transfer.offer import Offer, partial_key
from mistral_fetch.transfer.plan import check_assurance
from mistral_fetch.transfer.provenance import Ledger
from mistral_fetch.transfer.suspects import Suspects, sent_pieces

# How often a file may turn out wrong as a whole before a source that has no other mirror for it is given up.
MAX_WHOLE_FILE_FAILURES = 2


@dataclass(eq=False)
class Work:
    """One file on its way: its partial, whom to ask, and what it became."""

    entry: FileEntry
    partial: Partial
    suspects: Suspects
    blob: CommittedBlob | None = None
    assurance: Assurance = Assurance.SIZE
    failures: int = 0
    has_leftovers: bool = False
    """Bytes of an earlier run, whose senders nobody knows, are in it."""


def open_partial(layout: Layout, offer: Offer, entry: FileEntry) -> Partial:
    """Return what is there of a file, or the place where it will be."""
    directory = layout.partial(partial_key(offer, entry))
    return Partial(directory, entry.size or 0, entry.pieces, needs_piece_hashes=entry.sha256 is None)


def obtain_all(
    layout: Layout, offer: Offer, work: Sequence[Work], floor: Assurance, ledger: Ledger, stop: StopSignal
) -> None:
    """Fetch what is missing from one source after the other, until every file is a blob.

    Raises:
        AllSourcesFailed, TransferError, IntegrityError, AccessError, AssuranceTooLow: No source could deliver.
        StoreError, Interrupted: See :class:`~mistral_fetch.sources.base.Source`.
    """
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
    work: Sequence[Work],
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
            item.has_leftovers = bool(item.partial.present) and not item.suspects.alone
        turn.reverse()
        with PrefixFollower([(item.partial, _algorithms(item.entry)) for item in turn]) as follower:
            if not _fetch_or_drop(source, turn, ledger, stop):
                continue
            for item in turn:
                _commit(layout, offer, source, item, follower, ledger, stop)
        for twin in (item for item in missing if item not in turn):
            look_into_store(layout, offer, twin, ledger.report, stop)
            ledger.report(Progress(twin.entry.path, twin.partial.grid.size if twin.blob else 0))


def _fetch_or_drop(source: Source, turn: Sequence[Work], ledger: Ledger, stop: StopSignal) -> bool:
    """Fetch; a mirror that is asked alone and does not deliver makes way for the next one. Return whether all is there.

    Raises:
        TransferError, IntegrityError, AccessError: Nobody is left to ask.
    """
    try:
        source.fetch([Target(item.suspects.asked(), item.partial) for item in turn], ledger.report, stop)
    except (TransferError, IntegrityError, AccessError):
        alone = [item for item in turn if item.suspects.alone and item.partial.missing_pieces()]
        for item in alone:
            item.suspects.drop(item.suspects.alone)
        if not alone or not all(item.suspects.ask_next_alone() for item in alone):
            raise
        for item in alone:
            item.partial.reset()
        return False
    return True


def look_into_store(layout: Layout, offer: Offer, item: Work, report: Report, stop: StopSignal) -> None:
    """Take the blob that this transfer's earlier run committed, or else one of another model, read again as a whole."""
    entry, committed = item.entry, item.partial.committed
    is_ours = committed is not None and committed.size == entry.size and entry.sha256 in {None, committed.sha256}
    is_repair = offer.papers is not None  # a note says what the blob was, not what became of it
    if committed is not None and is_ours and not is_repair and find_blob(layout, committed.sha256, committed.size):
        item.blob, item.assurance = committed, max(entry.assurance, _source_assurance(offer, entry))
        with suppress(OSError):  # the run before may have died between naming and sealing it
            seal_blob(layout.blob(committed.sha256))
        return

    def salvage(path: Path, hashes: FileHashes | None) -> None:
        if salvage_blob(path, entry, item.partial, hashes, report, stop.check):
            item.partial = open_partial(layout, offer, entry)

    # Nobody knows what happened to it since, and what is promised besides its sha256 may be false.
    item.blob = adopt_blob(layout, entry, report, stop.check, salvage)
    item.assurance = entry.assurance


def _source_assurance(offer: Offer, entry: FileEntry) -> Assurance:
    """Return what a blob committed by an earlier run was at least proved by: no weaker source was let in."""
    levels = {"btmh": Assurance.BTV2, "btih": Assurance.BTV1, "archive-md5": Assurance.MD5}
    return levels.get(offer.identity.rpartition("-")[0], entry.assurance)


def _algorithms(entry: FileEntry) -> set[str]:
    return {digest.algorithm for digest in entry.checks}


def _commit(
    layout: Layout,
    offer: Offer,
    source: Source,
    item: Work,
    follower: PrefixFollower,
    ledger: Ledger,
    stop: StopSignal,
) -> None:
    look_into_store(layout, offer, item, ledger.report, stop)
    if item.blob is not None:
        return  # where locks do not work, another process may have been faster
    filled = item.partial.generation
    item.partial.prepare()
    if item.partial.generation != filled:
        return  # another process may be writing these bytes: they are fetched into a file of our own
    try:
        hashes = _hashes(item, follower, ledger, stop)
        item.blob = commit_partial(layout, item.entry, item.partial, ledger.report, stop.check, hashes)
    except DigestMismatch as error:
        item.failures += 1
        goes_on = _learn_from_mismatch(item, error, source.label, ledger)
        if not goes_on and item.failures >= MAX_WHOLE_FILE_FAILURES:
            liar = item.suspects.last_dropped or source.label
            raise DigestMismatch(f"{error.what}: {liar} sent another", detail=error.detail, hint=error.hint) from error
        return
    for lie in item.suspects.liars(item.blob, item.partial.grid):
        ledger.report(lie)
    item.assurance = max(item.entry.assurance, source.assurance)
    ledger.report(FileVerified(item.entry.path, item.blob.size, item.blob.sha256, item.assurance.label))


def _hashes(item: Work, follower: PrefixFollower, ledger: Ledger, stop: StopSignal) -> FileHashes | None:
    """Return the whole file's hashes if they were computed while it came; the tail is waited for."""

    def advance(done: int) -> None:
        stop.check()
        ledger.report(BytesVerified(item.entry.path, done, item.partial.grid.size))

    with disk_errors("verifying a download", item.partial.data_path):
        hashes = follower.finish(item.partial, advance)
    if hashes is not None:
        advance(hashes.size)
    return hashes


def _learn_from_mismatch(item: Work, error: DigestMismatch, label: str, ledger: Ledger) -> bool:
    """Tell a disk that changed under us from a source that lied; return whether somebody else can be asked."""
    changed = item.partial.recheck()
    if changed:
        places = ", ".join(map(str, changed[:3]))
        ledger.report(Notice(f"{item.entry.path}: bytes on disk changed after they were written at {places}"))
        return False
    suspects, sent = item.suspects, sent_pieces(item.partial.senders())
    hosts = sorted({host for host, _ in sent.values()})
    ledger.forget_senders(item.entry.path)
    if len(hosts) > 1:
        suspects.doubt(sent)
        ledger.report(Notice(f"{item.entry.path}: what {', '.join(hosts)} sent is not the file; each is asked alone"))
    else:
        expected, _, actual = error.detail.partition(", got ")
        liar = hosts[0] if hosts and not item.has_leftovers else label
        ledger.report(SourceLied(liar, item.entry.path, "the whole file", expected.removeprefix("expected "), actual))
        suspects.drop(liar)
    goes_on = suspects.ask_next_alone()
    if len(hosts) > 1 and goes_on:
        item.partial.keep_only(index for index, (host, _) in sent.items() if host == suspects.alone)
    else:
        item.partial.reset()
    return goes_on
