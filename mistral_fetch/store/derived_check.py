"""Whether what was made of a snapshot still is what was written, without reading gigabytes at every use.

Its papers keep the product's stamp: what ``stat`` said of the file right after it was made, or when it was last
hashed. As long as ``stat`` says the same, nobody wrote to the file: a write changes its ctime, which no call can set
back. A stamp that differs proves nothing (a copied cache has other inodes): the file is hashed, and the digest decides.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mistral_fetch.errors import MistralFetchError, StoreError
from mistral_fetch.events import Report
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.store.durable import disk_errors, write_durably
from mistral_fetch.store.snapshots import PROVENANCE_NAME, load_manifest, load_provenance
from mistral_fetch.store.verify import verify_directory

Stamp = dict[str, int]


def take_stamp(path: Path) -> Stamp:
    """Return what tells a file apart from the same file after anybody wrote to it. Times are in nanoseconds.

    Raises:
        OSError: There is no such file.
    """
    status = path.lstat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def is_as_written(
    directory: Path, product: str, report: Report, check_stop: Callable[[], None], *, may_write: bool = True
) -> bool:
    """Return whether the product in a complete directory has the digest it was written with.

    It is hashed only where its stamp differs; one that turns out right gets a new stamp, where that may be written.

    Raises:
        Interrupted: ``check_stop`` raised it.
    """
    path = directory / product
    try:
        manifest, papers = load_manifest(directory), load_provenance(directory)
        entry, stamp = manifest.entry(product), take_stamp(path)
        if not stat.S_ISREG(path.lstat().st_mode):
            return False  # a link's stamp says nothing of what it leads to
    except (MistralFetchError, OSError, KeyError):
        return False  # its own papers are damaged: nothing says what it should be
    noted = _noted(papers, product)
    if noted is not None and noted.get("stamp") == stamp:
        return True
    verdicts = verify_directory(directory, Manifest((entry,), manifest.info), report, check_stop)
    if not all(verdict.is_good for verdict in verdicts) or not _is_still(path, stamp):
        return False
    if may_write:
        _renew(directory, papers, entry, stamp)
    return True


def _noted(papers: dict[str, Any], product: str) -> dict[str, Any] | None:
    files = papers.get("files")
    found = files if isinstance(files, list) else []
    return next((file for file in found if isinstance(file, dict) and file.get("path") == product), None)


def _is_still(path: Path, stamp: Stamp) -> bool:
    """Return whether nobody wrote to the file while it was hashed."""
    try:
        return take_stamp(path) == stamp
    except OSError:
        return False


def _renew(directory: Path, papers: dict[str, Any], entry: FileEntry, stamp: Stamp) -> None:
    noted = _noted(papers, entry.path)
    if noted is None:
        return  # papers without it: it is hashed at each use
    noted |= {"stamp": stamp, "verified_at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    data = json.dumps(papers, indent=1, ensure_ascii=False).encode() + b"\n"
    # Where nothing may be written it is hashed again the next time, which is slow and right.
    with suppress(StoreError), disk_errors("noting that what was made of a model is right", directory):
        write_durably(directory / PROVENANCE_NAME, data)
