"""What lies beside a partial's bytes: which file they are to become, which blob they became, who holds them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.manifest import PieceHashes
from mistral_fetch.store.durable import disk_errors, write_durably

# For people: which model this file belongs to. Nothing is decided by it.
ABOUT_NAME = "about.json"
# What ``about.json`` says of a directory that holds no file but a torrent's own state.
TORRENT_STATE = "state of a torrent"
# Held by the process that fills the partial, so that one file is not fetched under two names at once.
LOCK_NAME = "lock"


@dataclass(frozen=True)
class CommittedBlob:
    """What a partial became: kept beside it until the snapshot is complete."""

    sha256: str
    size: int
    pieces: PieceHashes


def describe_partial(directory: Path, ref_key: str, path: str, size: int) -> None:
    """Note in a partial's directory, for ``list`` and ``rm``, which model and file it belongs to.

    Raises:
        StoreError: The disk refused.
    """
    with disk_errors("starting a download", directory):
        if not (directory / ABOUT_NAME).exists():
            fields = {"ref": ref_key, "path": path, "size": size, "since": int(time.time())}
            write_durably(directory / ABOUT_NAME, json.dumps(fields).encode())


@dataclass(frozen=True)
class Description:
    """What :func:`describe_partial` noted; ``since`` in seconds since 1970."""

    ref: str
    path: str
    since: int


def read_description(directory: Path) -> Description | None:
    """Return what was noted in a partial's directory, or None where the note is missing or torn."""
    try:
        fields = json.loads((directory / ABOUT_NAME).read_bytes())
        return Description(str(fields["ref"]), str(fields["path"]), int(fields["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
