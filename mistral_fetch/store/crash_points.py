"""Named places at which a process can be told to die, so that tests can ask what a power cut there leaves.

``MISTRAL_FETCH_CRASH_AT=name`` or ``name:n`` kills the process (SIGKILL) when it reaches the place for the first or
the n-th time. Unset, reaching a place costs a comparison. The places of a pull are listed in
:data:`CRASH_POINTS`, those of ``prune`` in :data:`REMOVAL_POINTS`.
"""

from __future__ import annotations

import os
import re
import signal
import threading

VARIABLE = "MISTRAL_FETCH_CRASH_AT"

CRASH_POINTS = (
    "piece-verified",  # hashed, not written
    "piece-written",  # written, not synced
    "data-synced",  # durable, not recorded
    "journal-appended",  # recorded, the record not synced
    "journal-synced",
    "commit-hashed",  # the whole file matched, nothing said so yet
    "commit-noted",  # committed.json is there, the blob has no name
    "blob-named",  # renamed, directories synced, still writable
    "blob-sealed",
    "snapshot-laid-out",  # links and papers are there, .complete is not
    "snapshot-complete",  # .complete is there, the directory has a hidden name
    "snapshot-named",
    "ref-written",  # the partials are still there
    "partials-removed",
)

REMOVAL_POINTS = (
    "trash-noted",  # entry.json is there, nothing was touched
    "trash-refs-removed",  # no name leads to the snapshot
    "trash-derived-moved",
    "trash-moved",
    "undo-moved",  # the snapshot is back, without a name
    "undo-named",  # the entry in the trash is still there
    "trash-forgotten",  # entry.json is gone, the bytes are there
    "trash-emptied",  # the snapshot is gone, its blobs are there
)

_lock = threading.Lock()
_reached = 0


def _armed(value: str) -> tuple[str, int]:
    name, _, count = value.partition(":")
    if value and (name not in (*CRASH_POINTS, *REMOVAL_POINTS) or not re.fullmatch(r"[1-9][0-9]{0,8}", count or "1")):
        raise SystemExit(f"{VARIABLE}={value}: expected name or name:n, the name one of {', '.join(CRASH_POINTS)}")
    return name, int(count or 1)


_NAME, _COUNT = _armed(os.environ.get(VARIABLE, ""))


def reached(name: str) -> None:
    """Die here if this is the armed place and its turn has come."""
    if name != _NAME:
        return
    global _reached
    with _lock:
        _reached += 1
        if _reached == _COUNT:
            os.kill(os.getpid(), signal.SIGKILL)
