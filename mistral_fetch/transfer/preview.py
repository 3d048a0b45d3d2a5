"""What a pull would do, found out without changing anything: the plan, where the bytes come from, what stops it.

Descriptions (manifests, listings, a magnet's metadata) are fetched; content is not, and the cache is not written to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import (
    AssuranceTooLow,
    ConfigError,
    Interrupted,
    MirrorError,
    MistralFetchError,
    OutOfSpace,
    StoreError,
    UsageError,
)
from mistral_fetch.events import Notice
from mistral_fetch.manifest import FileEntry
from mistral_fetch.ref import Ref
from mistral_fetch.sources.base import Source
from mistral_fetch.sources.failover import mirror_urls
from mistral_fetch.sources.http import HttpSource
from mistral_fetch.sources.urls import HTTP_SCHEMES, host_of
from mistral_fetch.store.blobs import find_blob
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partials import Partial
from mistral_fetch.store.snapshots import FROM_CACHE
from mistral_fetch.transfer.adoption import Adopter
from mistral_fetch.transfer.channels import Job, no_channel, refused_offline
from mistral_fetch.transfer.offer import Offer, names_content, partial_key
from mistral_fetch.transfer.plan import FileState, check_assurance, check_disk, check_quota, plan_transfer
from mistral_fetch.transfer.pull import already_here, is_described_here, refuse_unsigned_kinds
from mistral_fetch.transfer.resolve import Resolver
from mistral_fetch.transfer.shelves import open_shelves


@dataclass(frozen=True)
class FilePreview:
    """One file: what of it is here, who would be asked for the rest, and what would vouch for it.

    ``adoptable`` are files of this machine that may be this one; whether they are is found out by hashing them.
    """

    path: str
    size: int
    present_bytes: int
    sources: tuple[str, ...]
    adoptable: tuple[Path, ...]
    assurance: str

    @property
    def missing_bytes(self) -> int:
        """Return what has to come from somewhere."""
        return self.size - self.present_bytes


@dataclass(frozen=True)
class Preview:
    """What a pull would do. ``directory`` is where the model is if it is complete; then there is nothing else to say.

    ``disk_bytes`` is what would be written, ``refusal`` the error that the pull would end in before its first byte.
    """

    key: str
    channel: str
    directory: Path | None = None
    files: tuple[FilePreview, ...] = ()
    disk_bytes: int = 0
    free_bytes: int = 0
    refusal: MistralFetchError | None = None

    @property
    def adoptable_bytes(self) -> int:
        """Return what would not be downloaded if every adoptable file is the right one."""
        return sum(file.missing_bytes for file in self.files if file.adoptable)

    @property
    def to_fetch_bytes(self) -> int:
        """Return what would be downloaded."""
        return sum(file.missing_bytes for file in self.files) - self.adoptable_bytes


def preview(ref: Ref, job: Job, *, refresh: bool = False) -> Preview:
    """Return what :func:`~mistral_fetch.transfer.pull.pull` would do now.

    Raises:
        MistralFetchError: The pull would end in it, too, before anything is known to plan with.
    """
    refuse_unsigned_kinds(ref, job.settings)
    if not refresh and (here := already_here(job.layout, job.key, job.settings)):
        return Preview(job.key, here.channel, here.directory)
    if job.settings.offline and not (job.adopt_from and is_described_here(ref)):
        raise refused_offline(job.key, job.settings)
    with scratch_cache(job.layout) as scratch:
        may, catalog = bool(job.adopt_from), job.catalog
        with Resolver(scratch, job.settings, job.report, job.stop, may_adopt=may, catalog=catalog) as resolver:
            return _first_that_can(job, ref, resolver)


@contextmanager
def scratch_cache(layout: Layout) -> Iterator[Layout]:
    """Give a cache for one question only: a magnet's metadata is kept where it is fetched, and ours is not touched."""
    with TemporaryDirectory(prefix="mistral-fetch-") as name:
        scratch = Layout(Path(name))
        for kept in layout.partials.glob("torrent-*/metadata.torrent"):
            copy = scratch.partials / kept.parent.name / kept.name
            copy.parent.mkdir(parents=True)
            shutil.copyfile(kept, copy)
        yield scratch


def _first_that_can(job: Job, ref: Ref, resolver: Resolver) -> Preview:
    refused: list[Preview] = []
    causes: list[MistralFetchError] = []
    for candidate in resolver.candidates(ref):
        try:
            plan = _preview_offer(job, candidate.channel, candidate.open())
        except (StoreError, Interrupted, UsageError, ConfigError):
            raise
        except MistralFetchError as error:
            causes.append(error)
            job.report(Notice(f"{candidate.channel}: {error.what}"))
            continue
        if plan.refusal is None or isinstance(plan.refusal, OutOfSpace):
            return plan  # a full disk ends a pull, whatever other channels there are
        refused.append(plan)
    if refused:
        return refused[0]
    raise causes[0] if len(causes) == 1 else no_channel(job.key, causes)


def _preview_offer(job: Job, channel: str, offer: Offer) -> Preview:
    settings = job.settings
    adopter = Adopter(open_shelves(job.adopt_from, settings, job.report), settings.min_assurance, settings.disk_reserve)
    present = {entry.path: _present_bytes(job.layout, offer, entry) for entry in offer.manifest.files}
    missing = [entry for entry in offer.manifest.files if present[entry.path] < (entry.size or 0)]
    found = {entry.path: tuple(path for _, path in adopter.find(entry)) for entry in missing}
    wanted = tuple(entry for entry in missing if not found[entry.path])
    source, refusal = choose_source(job, offer, wanted)
    files = tuple(
        _preview_file(entry, present[entry.path], found.get(entry.path, ()), source) for entry in offer.manifest.files
    )
    free_bytes = shutil.disk_usage(_existing(job.layout.home)).free
    copied = sum(file.size for file in files if file.adoptable and not _can_link(file.adoptable[0], job.layout.home))
    states = {file.path: FileState(None, file.size if file.adoptable else file.present_bytes) for file in files}
    plan = plan_transfer(offer.manifest.files, states)
    try:
        check_quota(plan.total_bytes, settings.cache_quota, str(job.layout.home))
        check_disk(plan, free_bytes - copied, settings.disk_reserve, str(job.layout.home))
    except OutOfSpace as error:
        refusal = refusal or error
    return Preview(job.key, channel, None, files, plan.missing_bytes + copied, free_bytes, refusal)


def _present_bytes(layout: Layout, offer: Offer, entry: FileEntry) -> int:
    """Return how much of a file a pull would find in the cache. Blobs are not hashed for that."""
    size = entry.size or 0
    partial = Partial(layout.partial(partial_key(offer, entry)), size, entry.pieces)
    committed = partial.committed
    if committed is not None and not names_content(offer, entry):
        return 0  # what lies at an address may be another file by now
    if committed is not None and find_blob(layout, committed.sha256, size):
        return size
    return size if find_blob(layout, entry.sha256 or "-", size) else partial.present_bytes


def choose_source(
    job: Job, offer: Offer, wanted: Sequence[FileEntry]
) -> tuple[Source | None, MistralFetchError | None]:
    """Return the first source that may be used for the files, or why there is none."""
    if not wanted:
        return None, None
    if job.settings.offline:
        return None, refused_offline(job.key, job.settings)
    refusals: list[MistralFetchError] = []
    for opening in offer.sources:
        try:
            return _opened(opening, wanted, job.settings.min_assurance), None
        except (StoreError, Interrupted, UsageError):
            raise
        except MistralFetchError as error:
            refusals.append(error)
    too_weak = [error for error in refusals if isinstance(error, AssuranceTooLow)]
    return None, [*too_weak, *refusals, no_channel(job.key, [])][0]


def _opened(opening: Callable[[], Source], wanted: Sequence[FileEntry], floor: Assurance) -> Source:
    source = opening()
    check_assurance(tuple(wanted), source.assurance, floor)
    return source


def _preview_file(entry: FileEntry, present: int, adoptable: tuple[Path, ...], source: Source | None) -> FilePreview:
    size, assurance = entry.size or 0, entry.assurance
    if present == size:
        sources: tuple[str, ...] = (FROM_CACHE,)
    elif source is None:
        sources = ()
    else:
        sources = _hosts(entry) if isinstance(source, HttpSource) else (source.label,)
        if not adoptable:
            assurance = max(assurance, source.assurance)
    return FilePreview(entry.path, size, present, sources, adoptable, assurance.label)


def _hosts(entry: FileEntry) -> tuple[str, ...]:
    hosts = []
    for url in mirror_urls(entry, HTTP_SCHEMES):
        try:
            hosts.append(host_of(url))
        except MirrorError:
            continue  # not an address that anything can come from
    return tuple(dict.fromkeys(hosts))


def _existing(path: Path) -> Path:
    """Return the nearest directory that is there: a cache that is yet to be made will lie on its disk."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))


def _can_link(path: Path, home: Path) -> bool:
    """Return whether adopting a file costs no space: links and shared blocks need one disk."""
    try:
        return path.stat().st_dev == _existing(home).stat().st_dev
    except OSError:
        return False
