"""Making another form of a pulled model's weights, kept in the store beside the snapshot: once, whoever asks.

The fetcher never opens weights: whoever calls hands in what makes the file (the runtime, in a process of its own).
Here is everything around it: what is to be made, one process at a time, whether there is room, what is left over, and
that what is there already is still what was written. ``convert`` and ``quantize`` say what the forms are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.config import Settings
from mistral_fetch.errors import NotInCache, OutOfSpace, UsageError
from mistral_fetch.events import Notice, Report
from mistral_fetch.manifest import Manifest
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.derived import (
    Product,
    Recipe,
    discard_derived,
    find_derived,
    find_derived_drafts,
    write_derived,
)
from mistral_fetch.store.derived_check import is_as_written
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.snapshots import find_snapshot, load_manifest, load_provenance
from mistral_fetch.transfer.local import readable_layouts
from mistral_fetch.units import format_size

Make = Callable[[Path, Path], Product]
"""Reads the snapshot at the first path and writes a product into the directory at the second."""


@dataclass(frozen=True)
class Work:
    """What making a form of one model takes: the files it stands for, and about how many bytes it writes."""

    replaced: Collection[str]
    size: int


@dataclass(frozen=True)
class Form:
    """A form that weights can be brought into.

    ``key`` stands for every byte that is made, and for who may use it: another one, another directory. ``verb`` and
    ``noun`` are for people: quantize; int4 weights. ``plan`` is given a model's name and manifest, and refuses with a
    UsageError what has no weights for this form.
    """

    key: str
    product: str
    weight_format: str
    verb: str
    noun: str
    plan: Callable[[str, Manifest], Work]


@dataclass(frozen=True)
class Derivation:
    """A model in another form: where it is, and whether it was there already."""

    key: str
    directory: Path
    product: Product
    was_complete: bool


def find_right(
    layout: Layout, form: Form, content_digest: str, report: Report, check_stop: Callable[[], None]
) -> Derivation | None:
    """Return a form of a snapshot if it is complete and still what was written.

    Raises:
        Interrupted: ``check_stop`` raised it.
    """
    directory = find_derived(layout, form.key, content_digest)
    if directory is None or not is_as_written(directory, form.product, report, check_stop):
        return None
    return _describe(form, directory, was_complete=True)


def derive(
    form: Form, name: str, content_digest: str, settings: Settings, report: Report, stop: StopSignal, make: Make
) -> Derivation:
    """Make a form of a complete snapshot and return where it is. Nothing happens if it is there already, and right.

    Raises:
        NotInCache: The snapshot is gone.
        UsageError: It holds no weights for this form.
        OutOfSpace: There is no room for it.
        StoreLocked: Another process makes something of it, or removes it, for too long.
        StoreError: The disk refused.
        Interrupted: It was asked to stop.
        LaunchError: ``make`` failed.
    """
    layout = Layout(settings.home)
    if done := find_right(layout, form, content_digest, report, stop.check):
        return done
    if done := _find_shared(form, name, content_digest, settings, report, stop):
        return done

    def tell_owner(owner: str) -> None:
        report(Notice(f"waiting for {owner}"))

    lock = layout.derived_lock(content_digest)
    with locked(lock, f"{form.verb} {name}", settings.lock_timeout, tell_owner, stop.check):
        # While we waited, the other process may have done the work, or removed the model.
        if done := find_right(layout, form, content_digest, report, stop.check):
            return done
        source = find_snapshot(layout, content_digest)
        if source is None:
            raise _gone(name, layout)
        work = form.plan(name, load_manifest(source))
        _make_room(layout, form, name, content_digest, report)
        _check_disk(layout, form, work.size, settings.disk_reserve)
        report(Notice(f"{name}: writing {format_size(work.size)} of {form.noun}"))
        recipe = Recipe(form.key, form.weight_format, work.replaced)
        directory = write_derived(layout, recipe, content_digest, lambda draft: make(source, draft))
    return _describe(form, directory, was_complete=False)


def _find_shared(
    form: Form, name: str, content_digest: str, settings: Settings, report: Report, stop: StopSignal
) -> Derivation | None:
    """Return a form of a snapshot that lies in a shared cache; what is not there cannot be made there.

    Raises:
        UsageError: The snapshot is only in a shared cache, and this form of it is not.
    """
    shared = readable_layouts(settings.shared_homes)
    for place in shared:
        directory = find_derived(place, form.key, content_digest)
        if directory is not None and is_as_written(directory, form.product, report, stop.check, may_write=False):
            return _describe(form, directory, was_complete=True)
    if find_snapshot(Layout(settings.home), content_digest) is not None:
        return None
    if any(find_snapshot(place, content_digest) for place in shared):
        raise UsageError(
            f"{name} lies in a shared cache, which is only read",
            detail=f"expected {form.noun} of it there or a copy in {settings.home}, got neither",
            hint=f"pull a copy of your own first: MISTRAL_FETCH_SHARED_HOMES= mistral-fetch pull {name}",
        )
    return None


def _make_room(layout: Layout, form: Form, name: str, content_digest: str, report: Report) -> None:
    """Remove what a process left that died, and what is not what was written: it is made again."""
    for abandoned in find_derived_drafts(layout, content_digest):
        shutil.rmtree(abandoned, ignore_errors=True)
    wrong = layout.derived(form.key, content_digest)
    if wrong.is_dir():
        report(Notice(f"{name}: {wrong} is not what was written; making it again"))
        discard_derived(wrong)


def _check_disk(layout: Layout, form: Form, size: int, reserve_bytes: int) -> None:
    free = shutil.disk_usage(layout.home).free
    if free < size + reserve_bytes:
        raise OutOfSpace(
            f"not enough space to {form.verb} in the cache at {layout.home}",
            detail=(
                f"expected {format_size(size + reserve_bytes)} free ({format_size(size)} to write and"
                f" {format_size(reserve_bytes)} in reserve), got {format_size(free)}"
            ),
            hint="free some space, choose another disk with --home DIR, or lower MISTRAL_FETCH_DISK_RESERVE",
        )


def _describe(form: Form, directory: Path, *, was_complete: bool) -> Derivation:
    entry = load_manifest(directory).entry(form.product)
    origin = load_provenance(directory).get("derived_from")
    facts = origin.get("facts") if isinstance(origin, dict) else None
    product = Product(entry.path, entry.size or 0, entry.sha256 or "", facts if isinstance(facts, dict) else {})
    return Derivation(form.key, directory, product, was_complete)


def _gone(name: str, layout: Layout) -> NotInCache:
    return NotInCache(
        f"{name} is not complete in the cache at {layout.home}",
        detail="expected the snapshot that was just pulled, got none: another process removed it",
        hint="run the same command again",
    )
