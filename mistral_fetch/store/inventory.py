"""What the cache holds and how much disk each part takes, so that the parts add up to what ``du`` says.

Every file and directory is counted once, by the blocks it has: a blob that several models share belongs to none of
them alone. Nothing is changed, hashed or locked.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.store.gc import blob_names, list_partials
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.pins import is_pinned
from mistral_fetch.store.snapshots import RefRecord, list_refs
from mistral_fetch.store.use import last_used

# What has another name is nobody's model, and is left alone.
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HeldModel:
    """A snapshot: its names, its blobs, and what it takes beside them (papers, and what was made of it).

    ``used_at`` is when it was used last, in seconds since 1970: a pull is a use, too.
    """

    content_digest: str
    records: tuple[RefRecord, ...]
    blobs: frozenset[str]
    own_bytes: int
    used_at: float
    is_pinned: bool


@dataclass(frozen=True)
class Inventory:
    """A cache's parts. Sizes are of disk blocks, in bytes.

    ``blobs`` has the size of every blob. ``partials``, ``trash`` and ``drafts`` are directories with their own sizes.
    ``rest_bytes`` is everything that has no model: refs, locks, publications, and the directories themselves.
    """

    models: tuple[HeldModel, ...]
    blobs: Mapping[str, int]
    partials: Mapping[Path, int]
    trash: Mapping[Path, int]
    drafts: Mapping[Path, int]
    trashed_blobs: Mapping[Path, frozenset[str]]
    rest_bytes: int

    @property
    def owners(self) -> Counter[str]:
        """Return how many models each blob belongs to."""
        return Counter(name for model in self.models for name in model.blobs)

    def exclusive_bytes(self, model: HeldModel, owners: Mapping[str, int]) -> int:
        """Return what a model has to itself."""
        return model.own_bytes + sum(self.blobs.get(name, 0) for name in model.blobs if owners[name] == 1)

    def shared_bytes(self, model: HeldModel, owners: Mapping[str, int]) -> int:
        """Return what a model has in common with others."""
        return sum(self.blobs.get(name, 0) for name in model.blobs if owners[name] > 1)

    @property
    def all_shared_bytes(self) -> int:
        """Return what models have in common, each blob once."""
        return sum(self.blobs.get(name, 0) for name, count in self.owners.items() if count > 1)

    @property
    def trash_bytes(self) -> int:
        """Return what emptying the trash would free."""
        owners = self.owners
        names = set().union(*self.trashed_blobs.values())
        return sum(self.trash.values()) + sum(self.blobs.get(name, 0) for name in names if not owners[name])

    @property
    def unused_bytes(self) -> int:
        """Return the blobs that neither a model nor the trash has."""
        held = set(self.owners).union(*self.trashed_blobs.values())
        return sum(size for name, size in self.blobs.items() if name not in held)

    @property
    def total_bytes(self) -> int:
        """Return what the whole cache takes."""
        parts = (self.blobs, self.partials, self.trash, self.drafts)
        return sum(sum(part.values()) for part in parts) + self.rest_bytes + sum(m.own_bytes for m in self.models)


def take_inventory(layout: Layout) -> Inventory:
    """Return what the cache holds. What goes away meanwhile is not counted."""
    seen: set[tuple[int, int]] = set()
    # First of all, so that a hard link in a snapshot is not counted as the snapshot's own.
    blobs = {path.name: disk_bytes(path, seen) for path in layout.blobs.glob("*/*")}
    models = tuple(_models(layout, seen))
    drafts = {path: disk_bytes(path, seen) for path in find_all_drafts(layout)}
    partials = {path: disk_bytes(path, seen) for path in list_partials(layout)}
    trash = {path: disk_bytes(path, seen) for path in layout.trash.glob("*") if path.is_dir()}
    trashed = {path: frozenset(blob_names(path / "snapshot")) for path in trash}
    return Inventory(models, blobs, partials, trash, drafts, trashed, disk_bytes(layout.home, seen))


def find_all_drafts(layout: Layout) -> list[Path]:
    """Return every hidden directory in which something is being laid out, or was when its process died."""
    return [*layout.snapshots.glob(".*.tmp"), *layout.derivations.glob("*/.*.tmp")]


def disk_bytes(path: Path, seen: set[tuple[int, int]]) -> int:
    """Return the disk that a file or a directory with all below it takes, what was ``seen`` left out."""
    total = 0
    waiting = [str(path)]
    while waiting:
        current = waiting.pop()
        try:
            status = os.lstat(current)
            is_new = (status.st_dev, status.st_ino) not in seen
            seen.add((status.st_dev, status.st_ino))
            total += system.bytes_on_disk(status) if is_new else 0
            if os.path.isdir(current) and not os.path.islink(current):  # noqa: PTH112, PTH114 - thousands of them
                waiting += [entry.path for entry in os.scandir(current)]
        except OSError:
            continue  # gone meanwhile
    return total


def _models(layout: Layout, seen: set[tuple[int, int]]) -> Iterable[HeldModel]:
    records: dict[str, list[RefRecord]] = {}
    for record in list_refs(layout):
        records.setdefault(record.content_digest, []).append(record)
    digests = {path.name for path in (*layout.snapshots.glob("*"), *layout.derivations.glob("*/*")) if path.is_dir()}
    # A name that leads nowhere is a model too: one whose snapshot somebody took away.
    for digest in filter(_SHA256.fullmatch, sorted(digests | set(records))):
        directory, names = layout.snapshot(digest), tuple(records.get(digest, ()))
        derived = [path for path in layout.derivations.glob(f"*/{digest}") if path.is_dir()]
        own = disk_bytes(directory, seen) + sum(disk_bytes(path, seen) for path in derived)
        used_at = max([last_used(layout, digest), *(float(record.pulled_at) for record in names)])
        pinned = any(is_pinned(layout, record.key) for record in names)
        yield HeldModel(digest, names, frozenset(blob_names(directory)), own, used_at, pinned)
