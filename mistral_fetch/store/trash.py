"""What ``prune`` removed and can bring back: ``trash/<id>/`` with the snapshot's directory and the names it had.

A snapshot is moved by renames; its blobs stay where they are, since the trash counts as a user of them. So a crash at
any point loses no byte: the snapshot is in the one place or in the other, and ``entry.json``, written first, has its
names. Only emptying the trash deletes anything.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.digest import Digest
from mistral_fetch.store.crash_points import reached
from mistral_fetch.store.derived import list_derived
from mistral_fetch.store.durable import boot_id, disk_errors, fsync_directory, rename_durably, write_durably
from mistral_fetch.store.gc import RemovalPlan, blob_names, held_for_removal, referenced_blobs, remove_ref
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.snapshots import RefRecord, find_refs, find_snapshot, write_ref

_ENTRY_NAME = "entry.json"


@dataclass(frozen=True)
class TrashEntry:
    """A snapshot in the trash. ``removed_at`` is in seconds since 1970, ``uptime`` in seconds since ``boot`` began."""

    directory: Path
    content_digest: str
    records: tuple[RefRecord, ...]
    removed_at: float
    boot: str
    uptime: float

    def age(self, now: float, boot: str, uptime: float) -> float:
        """Return for how many seconds it has been here; a clock that is set meanwhile does not make it older."""
        if boot and boot == self.boot:
            return uptime - self.uptime
        return now - self.removed_at


def list_trash(layout: Layout) -> list[TrashEntry]:
    """Return what can be brought back, the latest first."""
    found = (read_entry(path) for path in sorted(layout.trash.glob("*"), reverse=True) if path.is_dir())
    return [entry for entry in found if entry is not None]


def read_entry(directory: Path) -> TrashEntry | None:
    """Return an entry, or None where nothing readable says what it was: it is being emptied, or is foreign."""
    try:
        fields = json.loads((directory / _ENTRY_NAME).read_bytes())
        digest = Digest("sha256", fields["content_digest"]).value
        records = tuple(
            RefRecord(str(ref["ref"]), str(ref["channel"]), digest, int(ref["pulled_at"])) for ref in fields["refs"]
        )
        return TrashEntry(
            directory, digest, records, float(fields["removed_at"]), str(fields["boot"]), float(fields["uptime"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def move_to_trash(layout: Layout, content_digest: str, records: Sequence[RefRecord]) -> TrashEntry:
    """Take a snapshot, what was made of it and its names away, so that all can be brought back.

    Raises:
        StoreLocked: A pull or a conversion works on it, or somebody reads it.
        StoreError: The disk refused; nothing is lost.
    """
    snapshot = layout.snapshot(content_digest)
    blobs = tuple(layout.blob(name) for name in sorted(blob_names(snapshot)))
    plan = RemovalPlan(tuple(records), (snapshot,), blobs, (), 0)
    with ExitStack() as locks:
        for key in sorted({record.key for record in records}):
            locks.enter_context(locked(layout.lock(key), f"prune {key}", 0.0, lambda _owner: None, lambda: None))
        locks.enter_context(held_for_removal(layout, plan))
        with disk_errors("moving a model to the trash", layout.trash):
            return _move(layout, content_digest, records)


def _move(layout: Layout, content_digest: str, records: Sequence[RefRecord]) -> TrashEntry:
    # While the locks were taken, a pull may have led one of the names somewhere else.
    current = [record for record in records if record in find_refs(layout, record.key)]
    entry = _note(layout, content_digest, current)
    reached("trash-noted")
    for record in current:
        remove_ref(layout, record)
    reached("trash-refs-removed")
    for made in list_derived(layout, content_digest):
        rename_durably(made, entry.directory / "derived" / made.parent.name)
    reached("trash-derived-moved")
    snapshot = layout.snapshot(content_digest)
    if snapshot.is_dir():
        rename_durably(snapshot, entry.directory / "snapshot")
    reached("trash-moved")
    return entry


def _note(layout: Layout, content_digest: str, records: Sequence[RefRecord]) -> TrashEntry:
    now = time.time()
    directory = layout.trash / f"{int(now):012d}-{content_digest[:16]}-{secrets.token_hex(4)}"
    entry = TrashEntry(directory, content_digest, tuple(records), now, boot_id(), time.monotonic())
    refs = [{"ref": r.key, "channel": r.channel, "pulled_at": r.pulled_at} for r in records]
    fields = {"schema": 1, "content_digest": content_digest, "refs": refs, "removed_at": entry.removed_at}
    data = json.dumps({**fields, "boot": entry.boot, "uptime": entry.uptime}, indent=1, ensure_ascii=False)
    write_durably(directory / _ENTRY_NAME, data.encode())
    return entry


def bring_back(layout: Layout, entry: TrashEntry) -> Path | None:
    """Put a snapshot, what was made of it and its names back, and return where it is; None if it cannot be whole.

    A name that leads to something else by now stays as it is.

    Raises:
        StoreLocked: One of its names is being pulled.
        StoreError: The disk refused; what is not back yet is still in the trash.
    """
    with ExitStack() as locks, disk_errors("bringing a model back", layout.trash):
        for key in sorted({record.key for record in entry.records}):
            locks.enter_context(locked(layout.lock(key), f"bring back {key}", 2.0, lambda _owner: None, lambda: None))
        _put_back(entry.directory / "snapshot", layout.snapshot(entry.content_digest))
        for made in sorted(entry.directory.glob("derived/*")):
            _put_back(made, layout.derivations / made.name / entry.content_digest)
        reached("undo-moved")
        for record in entry.records:
            if not any(known.channel == record.channel for known in find_refs(layout, record.key)):
                write_ref(layout, record)
        reached("undo-named")
        forget(entry.directory)
    return find_snapshot(layout, entry.content_digest)


def _put_back(source: Path, target: Path) -> None:
    if source.is_dir() and not target.exists():
        rename_durably(source, target)


def empty_entry(layout: Layout, directory: Path) -> int:
    """Delete an entry for good, with the blobs that nobody else has, and return their bytes.

    Raises:
        StoreLocked: A pull uses one of the blobs: they are left for another time.
        StoreError: The disk refused; what is left is found by the next prune.
    """
    names, entry = blob_names(directory / "snapshot"), read_entry(directory)
    with disk_errors("emptying the trash", directory):
        forget(directory)
        if entry is not None and not layout.snapshot(entry.content_digest).exists():
            layout.used(entry.content_digest).unlink(missing_ok=True)
    reached("trash-emptied")
    return remove_unused_blobs(layout, names)


def forget(directory: Path) -> None:
    """Delete an entry's directory: first what makes it an entry, so that half of one is never brought back."""
    (directory / _ENTRY_NAME).unlink(missing_ok=True)
    if directory.is_dir():
        fsync_directory(directory)
        reached("trash-forgotten")
        shutil.rmtree(directory)


def remove_unused_blobs(layout: Layout, names: set[str]) -> int:
    """Delete those of some blobs that nobody holds on to, and return their bytes.

    Raises:
        StoreLocked: A pull uses one of them.
        StoreError: The disk refused.
    """
    plan = RemovalPlan((), (), tuple(map(layout.blob, sorted(names - referenced_blobs(layout)))), (), 0)
    freed = 0
    with held_for_removal(layout, plan), disk_errors("removing what nobody uses", layout.blobs):
        # Once more, now that no pull can take one of them up.
        held = referenced_blobs(layout)
        for blob in plan.blobs:
            if blob.name not in held and blob.exists():
                freed += system.bytes_on_disk(blob.stat())
                blob.unlink(missing_ok=True)
    return freed
