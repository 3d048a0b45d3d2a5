"""The main job as one function, read downwards: find it here, else lock, resolve, try the channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_fetch.config import Settings
from mistral_fetch.errors import MistralFetchError, NotFoundError, StoreError, TrustError, UnsignedManifest
from mistral_fetch.events import Notice, Report
from mistral_fetch.ref import CatalogRef, ManifestRef, Ref, TorrentRef
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.gc import remove_empty_partials
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import load_provenance
from mistral_fetch.transfer.channels import Job, PullResult, refused_offline, try_candidates
from mistral_fetch.transfer.local import LocalModel, find_local, ref_key

if TYPE_CHECKING:
    from mistral_fetch.transfer.catalogs import CatalogInForce


def pull(
    ref: Ref,
    settings: Settings,
    report: Report,
    stop: StopSignal,
    *,
    refresh: bool = False,
    adopt_from: Sequence[Path] = (),
) -> PullResult:
    """Make a model complete in the cache and return where it is. Nothing happens if it is already.

    Args:
        ref: What to fetch.
        settings: Where to keep it, and which sources and assurance are acceptable.
        report: Told what happens.
        stop: Set it to stop in an orderly way.
        refresh: Look at the source again even if the cache has a complete snapshot of this name.
        adopt_from: Directories whose files are adopted where they are the promised ones.

    Raises:
        MistralFetchError: See ``docs/exit-codes.md``; whatever was verified is kept for the next run.
    """
    layout = Layout(settings.home)
    refuse_unsigned_kinds(ref, settings)
    known = _known_key(ref, settings)
    if known and not refresh and (here := already_here(layout, known, settings)):
        remove_empty_partials(layout, known)
        return here
    if settings.offline and not (adopt_from and is_described_here(ref)):
        raise _refused_offline(layout, known or ref_key(ref, settings), settings)
    key, catalog = name_today(ref, settings, report, stop)
    from mistral_fetch.store.lock import locked

    layout.prepare()

    def tell_owner(owner: str) -> None:
        report(Notice(f"waiting for {owner}"))

    with locked(layout.lock(key), f"pull {key}", settings.lock_timeout, tell_owner, stop.check):
        # While we waited, the other process may have done the work.
        if not refresh and (here := already_here(layout, key, settings)):
            return here
        return _fetch(ref, Job(key, layout, settings, report, stop, adopt_from, catalog))


def refuse_unsigned_kinds(ref: Ref, settings: Settings) -> None:
    """Refuse references that nobody can sign while keys are pinned.

    Raises:
        UnsignedManifest: ``ref`` is a hub repository, a torrent or a magnet link.
    """
    if settings.trust_keys:
        from mistral_fetch.trust import refuse_unsignable

        refuse_unsignable(ref, settings.trust_keys)


def _known_key(ref: Ref, settings: Settings) -> str | None:
    """Return the name in the cache as far as it is known here; a catalog on a server may have to be asked first."""
    if not isinstance(ref, CatalogRef) or "://" not in settings.catalog:
        return ref_key(ref, settings)
    try:
        return ref_key(ref, settings)
    except (NotFoundError, TrustError):
        return None


def name_today(
    ref: Ref, settings: Settings, report: Report, stop: StopSignal, *, keeps: bool = True
) -> tuple[str, CatalogInForce | None]:
    """Return the name of a model in the cache, and the catalog that says so, asked for now where it is on a server.

    Raises:
        UnknownModel, UsageError: There is no such thing to fetch.
        TrustError, TransferError: The catalog cannot be believed, or not be had.
    """
    if not isinstance(ref, CatalogRef) or not settings.catalog:
        return ref_key(ref, settings), None
    from mistral_fetch.transfer.catalogs import current_catalog

    catalog = current_catalog(settings, report, stop, keeps=keeps)
    return ref_key(ref, settings, catalog.catalog), catalog


def _refused_offline(layout: Layout, key: str, settings: Settings) -> MistralFetchError:
    if not settings.trust_keys or find_local(layout, key, settings.via) is None:
        return refused_offline(key, settings)
    return UnsignedManifest(
        f"{key} is complete in the cache, but no pinned key vouches for it",
        detail="expected it to have come by something that a pinned key signed, got another origin",
        hint="run it once without --offline, or without the demand: --trust-key none",
    )


def is_described_here(ref: Ref) -> bool:
    """Return whether what a reference consists of is known without a network: a manifest or torrent on this disk."""
    return isinstance(ref, ManifestRef | TorrentRef) and not ref.is_url


def already_here(layout: Layout, key: str, settings: Settings) -> PullResult | None:
    """Return the complete snapshot of a name, if there is one that is proved well enough. Nothing is hashed."""
    local = find_local(layout, key, settings.via, settings.shared_homes)
    return None if local is None else judge(local, key, settings)


def judge(local: LocalModel, key: str, settings: Settings) -> PullResult | None:
    """Return a complete snapshot as a result if its papers prove enough."""
    try:
        papers = load_provenance(local.directory)
    except StoreError:
        return None  # its papers are damaged: pulling writes them anew, and finds the bytes in the cache
    if settings.trust_keys and not _is_vouched_for(papers, local.record.channel, settings):
        return None
    files = papers.get("files", [])
    levels = [str(file.get("assurance", "size")) for file in files if isinstance(file, dict)]
    weakest = min(levels, key=_rank, default="size")
    if _rank(weakest) < settings.min_assurance:
        return None
    record = local.record
    return PullResult(key, local.directory, record.content_digest, record.channel, weakest, True, 0)


def _is_vouched_for(papers: Mapping[str, Any], channel: str, settings: Settings) -> bool:
    from mistral_fetch.transfer.authenticity import is_vouched_for

    return is_vouched_for(papers, channel, settings)


def _rank(label: str) -> int:
    from mistral_fetch.digest import Assurance

    try:
        return Assurance.parse(label)
    except ValueError:
        return 0


def _fetch(ref: Ref, job: Job) -> PullResult:
    from mistral_fetch.transfer.resolve import Resolver

    may_adopt = bool(job.adopt_from)
    with Resolver(job.layout, job.settings, job.report, job.stop, may_adopt=may_adopt, catalog=job.catalog) as resolver:
        result = try_candidates(job, resolver.candidates(ref))
        resolver.linger(result.directory)
        return result
