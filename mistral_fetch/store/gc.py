"""Deleting: plan what a removal frees, then execute the plan. ``--dry-run`` is the plan alone.

A blob is kept as long as any snapshot links to it, and the refs go first: a crash in between leaves bytes
nobody names, never a name without its bytes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.errors import MistralFetchError, StoreError
from mistral_fetch.store.derived import find_derived_drafts, list_derived, own_bytes
from mistral_fetch.store.durable import disk_errors, fsync_directory, has_blocks
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.partial_notes import LOCK_NAME, read_description
from mistral_fetch.store.partials import Partial
from mistral_fetch.store.snapshots import RefRecord, find_drafts, list_refs, load_manifest

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemovalPlan:
    """What a removal deletes: refs, then what was made of snapshots, then these, then blobs; and the bytes it frees."""

    refs: tuple[RefRecord, ...]
    snapshots: tuple[Path, ...]
    blobs: tuple[Path, ...]
    partials: tuple[Path, ...]
    freed_bytes: int
    derived: tuple[Path, ...] = ()

    @property
    def content_digests(self) -> set[str]:
        """Return the snapshots that go, or from which something goes."""
        return {path.name for path in (*self.snapshots, *self.derived) if not path.name.startswith(".")}


def plan_removal(layout: Layout, records: Sequence[RefRecord], partials: Sequence[Path] = ()) -> RemovalPlan:
    """Return what deleting these refs (and partials) would delete, touching nothing."""
    kept = {record.content_digest for record in list_refs(layout) if record not in records}
    doomed = sorted({record.content_digest for record in records} - kept)
    # A process that died while it laid the model out left a draft, which must not keep the blobs for ever.
    drafts = [draft for digest in doomed for draft in find_drafts(layout, digest)]
    excluded = {*doomed, *(draft.name for draft in drafts)}
    still_used = {layout.blob(name) for name in _held_by_snapshots(layout, excluded)}
    blobs = sorted({blob for digest in doomed for blob in _blobs_of(layout, layout.snapshot(digest))} - still_used)
    snapshots = [layout.snapshot(digest) for digest in doomed if layout.snapshot(digest).is_dir()]
    derived = [
        path for digest in doomed for path in (*list_derived(layout, digest), *find_derived_drafts(layout, digest))
    ]
    freed = sum(blob.stat().st_size for blob in blobs) + sum(allocated_bytes(path) for path in partials)
    freed += sum(map(own_bytes, derived))
    return RemovalPlan(tuple(records), (*snapshots, *drafts), tuple(blobs), tuple(partials), freed, tuple(derived))


@contextmanager
def held_for_removal(layout: Layout, plan: RemovalPlan) -> Iterator[None]:
    """Hold the files of a plan alone, so that no pull adopts or fills what is about to go.

    A pull holds the locks of its files' partials from before it looks for their blobs until its ref is written; a
    conversion holds one of its snapshot, and whoever reads the snapshot another.

    Raises:
        StoreLocked: A pull uses one of the files, or somebody the snapshot.
    """
    homes = {layout.partial(f"sha256-{blob.name}") for blob in plan.blobs}
    digests = plan.content_digests
    uses = {*map(layout.derived_lock, digests), *map(layout.use_lock, digests)}
    held = sorted({*(directory / LOCK_NAME for directory in (*homes, *plan.partials)), *uses})
    with ExitStack() as locks:
        for path in held:
            locks.enter_context(locked(path, "rm", 0.0, lambda _owner: None, lambda: None))
            locks.callback(_remove_if_empty, path.parent)  # what was made for its lock
        yield
        for path in uses:
            path.unlink(missing_ok=True)
        for directory in homes:
            if not has_blocks(directory / "data"):
                shutil.rmtree(directory, ignore_errors=True)


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        if [path.name for path in directory.iterdir()] == [LOCK_NAME]:
            shutil.rmtree(directory, ignore_errors=True)


def execute_removal(layout: Layout, plan: RemovalPlan) -> None:
    """Carry a removal plan out.

    Raises:
        StoreError: The disk refused; the same plan can be carried out again.
    """
    with disk_errors("removing a model", layout.home):
        for record in plan.refs:
            remove_ref(layout, record)
        for directory in (*plan.derived, *plan.snapshots):
            # Not complete any more before anything in it goes, so no reader trusts a half-removed directory.
            (directory / ".complete").unlink(missing_ok=True)
            _remove_tree(directory)
        for blob in plan.blobs:
            blob.unlink(missing_ok=True)
        for partial in plan.partials:
            _remove_tree(partial)
        for directory in plan.snapshots:
            layout.used(directory.name).unlink(missing_ok=True)


def remove_ref(layout: Layout, record: RefRecord) -> None:
    """Take one name of a snapshot away, durably.

    Raises:
        OSError: The disk refused.
    """
    path = layout.ref(record.key, record.channel)
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        fsync_directory(path.parent)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()


def _remove_tree(directory: Path) -> None:
    if directory.is_dir():
        fsync_directory(directory)
        shutil.rmtree(directory)


def allocated_bytes(directory: Path) -> int:
    """Return how much disk a directory's files take, holes of sparse files left out."""
    return sum(system.bytes_on_disk(path.stat()) for path in directory.rglob("*") if path.is_file())


def list_partials(layout: Layout) -> list[Path]:
    """Return the directories of all unfinished files."""
    try:
        return sorted(path for path in layout.partials.iterdir() if path.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_empty_partials(layout: Layout, ref_key: str) -> list[Path]:
    """Return the directories that an abandoned channel of this ref left without any of a file's bytes in them."""
    empty = (path for path in list_partials(layout) if not has_blocks(path / "data"))
    return [path for path in empty if (noted := read_description(path)) is not None and noted.ref == ref_key]


def remove_empty_partials(layout: Layout, ref_key: str) -> None:
    """Remove what a process left that died between writing this ref and removing its partials; see above.

    Nothing depends on it: what is in use stays for another time, and so does what the disk does not let go of.
    """
    left = list_empty_partials(layout, ref_key)
    if not left:
        return
    with suppress(StoreError), locked(layout.lock(ref_key), "tidy up", 0.0, lambda _owner: None, lambda: None):
        for directory in left:
            with suppress(StoreError), locked(directory / LOCK_NAME, "tidy up", 0.0, lambda _o: None, lambda: None):
                shutil.rmtree(directory, ignore_errors=True)


def _snapshots(layout: Layout, excluding: Collection[str]) -> list[Path]:
    try:
        return [path for path in layout.snapshots.iterdir() if path.is_dir() and path.name not in excluding]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _blobs_of(layout: Layout, directory: Path) -> list[Path]:
    return [path for path in map(layout.blob, sorted(blob_names(directory))) if path.is_file()]


def blob_names(directory: Path) -> set[str]:
    """Return the digests of the blobs that a snapshot's directory stands for, wherever the directory lies.

    A damaged one still holds on to what its links say, and so does a draft.
    """
    try:
        return {entry.sha256 or "" for entry in load_manifest(directory).files}
    except MistralFetchError:
        links = (path.readlink().name for path in directory.rglob("*") if path.is_symlink())
        return {name for name in links if _SHA256.fullmatch(name)}


def referenced_blobs(layout: Layout) -> set[str]:
    """Return the digests of all blobs that a snapshot, a draft, the trash or an unfinished pull holds on to."""
    # Unfinished pulls first: what one finishes meanwhile is found in its snapshot.
    committed = [Partial(directory, 0).committed for directory in list_partials(layout)]
    return {note.sha256 for note in committed if note is not None} | _held_by_snapshots(layout, ())


def _held_by_snapshots(layout: Layout, excluding: Collection[str]) -> set[str]:
    places = [*_snapshots(layout, excluding), *layout.trash.glob("*/snapshot")]
    return set().union(*(blob_names(directory) for directory in places))
