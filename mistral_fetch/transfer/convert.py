"""Making the safe copy of a pulled model: weights without their pickle, kept in the store beside the snapshot.

The fetcher never opens weights: whoever calls hands in what makes the file (the runtime, in a process of its own).
Here is everything around it: what is to be converted, one process at a time, whether there is room, what is left over.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
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
    find_derived,
    find_derived_drafts,
    write_derived,
)
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.snapshots import find_snapshot, load_manifest
from mistral_fetch.units import format_size

# The runtime writes this name into the file; a test holds the two together.
SAFETENSORS_RECIPE = "safetensors-1"
PRODUCT_NAME = "consolidated.safetensors"
_PICKLE = re.compile(r"consolidated\.[0-9]{2}\.pth")

Make = Callable[[Path, Path], Product]
"""Reads the snapshot at the first path and writes a product into the directory at the second."""


@dataclass(frozen=True)
class Conversion:
    """The converted model: where it is, and whether it was there already."""

    recipe: str
    directory: Path
    product: Product
    was_complete: bool


def find_conversion(layout: Layout, content_digest: str) -> Conversion | None:
    """Return the safetensors copy of a snapshot if it is complete. Nothing is hashed."""
    directory = find_derived(layout, SAFETENSORS_RECIPE, content_digest)
    return None if directory is None else _describe(directory, was_complete=True)


def convert(
    key: str, content_digest: str, settings: Settings, report: Report, stop: StopSignal, make: Make
) -> Conversion:
    """Make the safetensors copy of a complete snapshot and return where it is. Nothing happens if it is there already.

    Raises:
        NotInCache: The snapshot is gone.
        UsageError: It holds no pickle.
        OutOfSpace: There is no room for a second copy of the weights.
        StoreLocked: Another process converts it, or removes it, for too long.
        StoreError: The disk refused.
        LaunchError: ``make`` failed.
    """
    layout = Layout(settings.home)
    if done := find_conversion(layout, content_digest):
        return done

    def tell_owner(owner: str) -> None:
        report(Notice(f"waiting for {owner}"))

    lock = layout.derived_lock(content_digest)
    with locked(lock, f"convert {key}", settings.lock_timeout, tell_owner, stop.check):
        # While we waited, the other process may have done the work, or removed the model.
        if done := find_conversion(layout, content_digest):
            return done
        source = find_snapshot(layout, content_digest)
        if source is None:
            raise _gone(key, layout)
        for abandoned in find_derived_drafts(layout, content_digest):
            shutil.rmtree(abandoned, ignore_errors=True)
        manifest = load_manifest(source)
        pickles = _pickles(key, manifest)
        size = sum(manifest.entry(path).size or 0 for path in pickles)
        _check_disk(layout, size, settings.disk_reserve)
        report(Notice(f"{key}: writing {format_size(size)} of weights as safetensors"))
        recipe = Recipe(SAFETENSORS_RECIPE, "consolidated-safetensors", pickles)
        directory = write_derived(layout, recipe, content_digest, lambda draft: make(source, draft))
    return _describe(directory, was_complete=False)


def _pickles(key: str, manifest: Manifest) -> list[str]:
    paths = [entry.path for entry in manifest.files]
    pickles = [path for path in paths if _PICKLE.fullmatch(path)]
    # What it would be converted to may be there beside it.
    others = [path for path in paths if path.endswith(".safetensors")]
    if not pickles or others:
        found = ", ".join(others[:3]) or "no weights in that layout"
        raise UsageError(
            f"{key} has no weights that need converting",
            detail=f"expected consolidated.00.pth alone, got {found}",
            hint="leave --convert out: only pickles are converted",
        )
    return pickles


def _check_disk(layout: Layout, size: int, reserve_bytes: int) -> None:
    free = shutil.disk_usage(layout.home).free
    if free < size + reserve_bytes:
        raise OutOfSpace(
            f"not enough space to convert in the cache at {layout.home}",
            detail=(
                f"expected {format_size(size + reserve_bytes)} free ({format_size(size)} to write and"
                f" {format_size(reserve_bytes)} in reserve), got {format_size(free)}"
            ),
            hint="free some space, choose another disk with --home DIR, or lower MISTRAL_FETCH_DISK_RESERVE",
        )


def _describe(directory: Path, *, was_complete: bool) -> Conversion:
    entry = load_manifest(directory).entry(PRODUCT_NAME)
    product = Product(entry.path, entry.size or 0, entry.sha256 or "")
    return Conversion(SAFETENSORS_RECIPE, directory, product, was_complete)


def _gone(key: str, layout: Layout) -> NotInCache:
    return NotInCache(
        f"{key} is not complete in the cache at {layout.home}",
        detail="expected the snapshot that was just pulled, got none: another process removed it",
        hint="run the same command again",
    )
